"""mindone's packages in a user's process are its own; those that our command imports quickly give all that these do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_LIBRARY = """
import sys
from mindiffedit import StableDiffusionDiffEditPipeline, demo
pipe = StableDiffusionDiffEditPipeline.from_pretrained(demo.checkpoint_folder())
import mindone.diffusers, mindone.transformers
from mindiffedit.runtime.quick_imports import PACKAGES
for name in PACKAGES:
    assert "quick_imports" not in type(sys.modules.get(name, sys)).__module__, name
assert not [finder for finder in sys.meta_path if "quick_imports" in type(finder).__module__]
assert mindone.diffusers.UNet2DConditionModel is type(pipe.unet)
assert mindone.diffusers.AutoencoderKL is type(pipe.vae)
assert mindone.transformers.CLIPTextModel is type(pipe.text_encoder)
assert all(hasattr(mindone.transformers, name) for name in ("T5EncoderModel", "BertModel", "__version__"))
"""

_COMMAND = """
import sys
from mindiffedit.runtime import quick_imports
quick_imports.install()
from mindone.transformers.models.clip.modeling_clip import CLIPTextModel
from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
loaded = [name for name in sys.modules if name.startswith("mindone.")]
assert len(loaded) < 300, len(loaded)
import mindone.transformers
from mindone.transformers import CLIPTextModel as same, T5EncoderModel, __version__
assert same is CLIPTextModel and T5EncoderModel.__module__.endswith("modeling_t5") and __version__
import mindone.diffusers
assert mindone.diffusers.UNet2DConditionModel is UNet2DConditionModel
assert mindone.transformers.models.clip.CLIPTextModel is CLIPTextModel
assert not hasattr(mindone.transformers, "there_is_no_such_name")  # makes it run its whole __init__
assert mindone.transformers.BertModel and mindone.transformers.CLIPTextModel is CLIPTextModel
assert "AutoModel" in dir(mindone.transformers)
"""


def test_a_users_program_gets_mindones_own_packages_and_our_command_the_same_names():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "USE_TORCH": "0"}  # as transformers would import it
    for program in (_LIBRARY, _COMMAND):
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
