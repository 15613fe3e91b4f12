"""One row more, under another attention function: the perturb slot of a Guidance."""

from dataclasses import dataclass

from torch import Tensor

from ..errors import BadInput
from ..unet import Site, attention


@dataclass(frozen=True)
class PAG:
    """Away from what the text gives when the pixels of these blocks attend to themselves only (2403.17377, eq. 16)."""

    scale: float = 3.0
    layers: tuple[str, ...] = ("middle_block",)

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not self.layers:
            raise BadInput(f"layers are names of blocks in a tuple, such as ('middle_block',), not {self.layers!r}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Identity self-attention in the layers; elsewhere the network's own attention."""
        here = any(f"{site.block}.".startswith(f"{layer}.") for layer in self.layers)
        return v if here and site.kind == "self" else attention(q, k, v, site)
