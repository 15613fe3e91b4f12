"""scfg: Stable Diffusion sampling in which attention maps are values: regions can be seen and guided one by one."""

from .denoise import Denoised, Denoiser
from .diffusion import Diffusion, Step, load, run
from .errors import BadInput
from .guidance import CFG, SCFG, Guidance, Outputs, Row
from .samplers import SAMPLERS
from .schedule import Moment, Schedule
from .segment import OFFICIAL, PAPER, Recipe, Regions, Tokens, Word, segment_maps
from .text import Prompt
from .unet import Capture, Conditioning, Maps, Site, attention

__all__ = ["BadInput", "CFG", "Capture", "Conditioning", "Denoised", "Denoiser", "Diffusion", "Guidance"]
__all__ += ["Maps", "Moment", "OFFICIAL", "Outputs", "PAPER", "Prompt", "Recipe", "Regions", "Row", "SAMPLERS", "SCFG"]
__all__ += ["Schedule", "Site", "Step", "Tokens", "Word", "attention", "load", "run", "segment_maps"]

from .data import from_dict, to_dict  # noqa: E402

__all__ += ["from_dict", "to_dict"]

# wings
from . import edit as edit  # noqa: E402
from . import formats as formats  # noqa: E402
from . import methods as methods  # noqa: E402
from . import prompting as prompting  # noqa: E402
from . import regional as regional  # noqa: E402
from .formats import save as save  # noqa: E402
from .methods import *  # noqa: E402, F403
from .regional import *  # noqa: E402, F403

__all__ += ["save"]  # from formats
__all__ += methods.__all__
__all__ += regional.__all__
