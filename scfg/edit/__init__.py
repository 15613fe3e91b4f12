"""Functions of a Denoise to a Denoise."""

from .refiner import check_refiner, hand_over, handover_time

__all__ = ["check_refiner", "hand_over", "handover_time"]
