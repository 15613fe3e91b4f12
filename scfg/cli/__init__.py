"""What sample.py is made of: its arguments, the plan of a run, its files."""

from .arguments import parse
from .files import check_writable, next_number, parameters, save, texts_of, without_batch
from .job import Job, in_short, load, plan, spent, summary
from .shell import reporting_errors

__all__ = ["Job", "check_writable", "in_short", "load", "next_number", "parameters", "parse", "plan"]
__all__ += ["reporting_errors", "save", "spent", "summary", "texts_of", "without_batch"]
