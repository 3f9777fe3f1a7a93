"""Packages that are imported quickly give all that the libraries' own do, and leave a user's program as it was."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_LIBRARY = """
import sys, types
from mindiffedit import StableDiffusionDiffEditPipeline, demo
finders = [*sys.meta_path]
pipe = StableDiffusionDiffEditPipeline.from_pretrained(demo.checkpoint_folder())
assert sys.meta_path == finders
from mindiffedit.runtime.quick_imports import MINDONE, PACKAGES
for name in {*PACKAGES} - MINDONE:
    assert "quick_imports" not in type(sys.modules.get(name, sys)).__module__, name
assert len([name for name in sys.modules if name.startswith("mindone.")]) < 400
import mindone.diffusers, mindone.transformers
assert mindone.diffusers.UNet2DConditionModel is type(pipe.unet)
assert mindone.diffusers.AutoencoderKL is type(pipe.vae)
assert mindone.transformers.CLIPTextModel is type(pipe.text_encoder)
assert all(hasattr(mindone.transformers, name) for name in ("T5EncoderModel", "BertModel", "__version__"))
names = dir(mindone.transformers)
assert "BertModel" in names and type(mindone.transformers) is types.ModuleType
import importlib
before = vars(mindone.transformers).copy()
importlib.reload(mindone.transformers)  # the whole `__init__`
assert vars(mindone.transformers).keys() == before.keys()
assert mindone.transformers.CLIPTextModel is type(pipe.text_encoder)
"""

_COMMAND = """
import sys
from mindiffedit.runtime import quick_imports
quick_imports.install(quick_imports.PACKAGES)
quick_imports.import_beside()
import mindspore, scipy, transformers
from mindone.transformers.models.clip.modeling_clip import CLIPTextModel
from mindone.diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
for name, most in {"mindone": 300, "mindspore": 1200, "scipy": 300, "transformers": 100}.items():
    loaded = [module for module in sys.modules if module.startswith(f"{name}.")]
    assert len(loaded) < most, (name, len(loaded))
assert "mindspore.dataset.engine" not in sys.modules and "mindspore.ops._op_impl.aicpu" not in sys.modules
quick_imports.complete_for("CPU")
assert "mindspore.ops._op_impl.aicpu" not in sys.modules
quick_imports.complete_for("Ascend")
assert "mindspore.ops._op_impl.aicpu" in sys.modules

import mindone.transformers
from mindone.transformers import CLIPTextModel as same, T5EncoderModel, __version__
assert same is CLIPTextModel and T5EncoderModel.__module__.endswith("modeling_t5") and __version__
import mindone.diffusers
assert mindone.diffusers.UNet2DConditionModel is UNet2DConditionModel
assert mindone.transformers.models.clip.CLIPTextModel is CLIPTextModel
assert not hasattr(mindone.transformers, "there_is_no_such_name")  # makes it run its whole `__init__`
assert mindone.transformers.BertModel and mindone.transformers.CLIPTextModel is CLIPTextModel
assert "AutoModel" in dir(mindone.transformers)

assert mindspore.save_checkpoint.__module__ == "mindspore.train.serialization"
assert mindspore.dataset.GeneratorDataset and mindspore.train.Model is mindspore.Model
assert mindspore.nn.Accuracy is mindspore.train.metrics.Accuracy and mindspore.profiler.Profiler
quick = {name: value for name, value in vars(mindspore).items() if not name.startswith("_")}
assert "Callback" in mindspore.__all__  # all of it
assert all(getattr(mindspore, name) is value for name, value in quick.items())
assert transformers.BertConfig.__module__ == "transformers.models.bert.configuration_bert"
assert not hasattr(transformers, "there_is_no_such_name")
assert transformers.CLIPTokenizer and "GPT2Config" in dir(transformers)
assert scipy.stats.norm.cdf(0) == 0.5 and scipy.linalg.det([[2.0]]) == 2
"""


def _run(program):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "USE_TORCH": "0"}  # as transformers would import it
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_users_program_has_all_of_mindone_when_it_asks():
    _run(_LIBRARY)


def test_the_commands_packages_give_all_that_the_libraries_do():
    _run(_COMMAND)
