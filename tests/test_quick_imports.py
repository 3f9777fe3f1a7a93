"""mindone's packages put in place by `quick_imports` give everything that its own do."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_PROGRAM = """
import sys
from mindiffedit import quick_imports
quick_imports.prepare()
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


def test_the_rest_of_mindone_is_there_when_it_is_asked_for():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
