"""The files of checkpoints: their names, what is in them, changes to them, and the hub's cache made of them."""

import json
import shutil

import numpy as np

from mindiffedit.checkpoints.models import parameters_by_name

MODEL_FILES = {
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "safety_checker": "safety_checker/model.safetensors",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read_tensors(path):
    """{name: numpy array} of a safetensors file, by its own library."""
    from safetensors.numpy import load_file

    return load_file(str(path))


def write_tensors(path, tensors):
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, str(path), metadata={"format": "pt"})


def change_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def parameters(model):
    """{torch's name: numpy array} of a loaded model."""
    return {name: p.asnumpy() for name, p in parameters_by_name(model).items()}


def assert_same(model, expected):
    """Every parameter is there and has the expected values bit by bit."""
    found = parameters(model)
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def make_cache(root, folder, repo="someone/tiny-model", skip=()):
    """The hub's cache as a download of `folder` leaves it; returns the snapshot folder."""
    home = root / ("models--" + repo.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).parts[0] not in skip:
            target = snapshot / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return snapshot
