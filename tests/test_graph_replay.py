"""Ascend's graphs in torch: their errors in each dtype, and that defects in them are found."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import device_stand_ins  # noqa: E402
import graph_replay  # noqa: E402
from device_graphs import load, picture, place_of, there_and_back  # noqa: E402
from graph_replay import errors_of, faults_of  # noqa: E402

from mindiffedit.runtime.graphs import Graphs  # noqa: E402

MISSING = device_stand_ins.missing_tools()
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


@pytest.fixture(scope="module")
def graphs(sd1_folder, tmp_path_factory):
    """The folder of an edit's graphs for Ascend in float16."""
    if lacking := device_stand_ins.missing_plugin("Ascend"):
        pytest.skip(f"this MindSpore has no {lacking}")
    work = tmp_path_factory.mktemp("replay")
    environment = device_stand_ins.build("Ascend", work / "stand-ins")
    return graph_replay.export(environment, work / "export", "float16", sd1_folder)


class KeptGraphs(Graphs):
    """Keeps the last arguments and result of each graph, by its name."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def compiled(self, function, key, model=None):
        run = super().compiled(function, key, model)

        def kept(*arguments):
            result = run(*arguments)
            self.kept[place_of(key, arguments)] = arguments, result
            return result

        return kept


def error(got, expected) -> float:
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


@needs_tools
@pytest.mark.tools
def test_an_edit_as_ascend_makes_it_in_float16(graphs, sd1_folder):
    """Against the same edit in float32 on a CPU: the picture, and the solver's step alone, which stays float32."""
    pipe = load(str(sd1_folder), {"dtype": "float32"})

    def edit(how: Graphs) -> np.ndarray:
        pipe._stages.forget()
        pipe._stages.graphs = how
        return there_and_back(pipe, picture(64))

    ours = KeptGraphs()
    expected = edit(ours)
    place = next(place for place in ours.kept if place.startswith("update "))
    arguments, (latents, _) = ours.kept[place]
    errors = {}
    for defect in (None, *graph_replay.DEFECTS):
        replayed = graph_replay.ReplayedGraphs(graphs, defect)
        step, _ = replayed.replays[place](*(torch.from_numpy(argument.asnumpy()) for argument in arguments))
        with graph_replay.computed_apart():
            errors[defect] = error(edit(replayed), expected), error(step.numpy(), latents.asnumpy())
    # Measured: 9.6e-3 for the picture, which a random model makes of 1e-3, and 6.4e-2 with the wrong scale.
    assert 0 < errors[None][0] < 2e-2 and errors[None][1] < 1e-6, errors
    assert errors["a wrong scale"][0] > 4e-2 and errors["a missing cast"][1] > 1e-4, errors


def test_errors():
    reference = {
        "mask/source_prompt_embeds": np.ones((1, 2, 3)),
        "mask/mask": np.array([[[0, 1], [1, 1]]]),
        "invert/inverted_latents": np.stack([np.ones((1, 1, 2, 2)), np.full((1, 1, 2, 2), 2.0)]),
        "mask/timestep": np.array(3),
    }
    assert errors_of(reference, reference) == {"embeds": 0, "mask": 0, "inverted_latents": 0}
    ours = {name: array.astype(float) for name, array in reference.items()}
    ours["mask/mask"][0, 0, 0] = 1
    ours["invert/inverted_latents"][1] += 0.5
    errors = errors_of(ours, reference)
    assert errors["mask"] == 0.25 and math.isclose(errors["inverted_latents"], math.sqrt(0.05))
    assert faults_of("float16", True, errors) and not faults_of("float16", True, errors_of(reference, reference))
    for bad in (np.full((1, 2, 3), np.nan), np.ones((1, 2, 4))):
        assert errors_of({**ours, "mask/source_prompt_embeds": bad}, reference)["embeds"] == math.inf
    del ours["mask/source_prompt_embeds"]
    assert errors_of(ours, reference)["embeds"] == math.inf
    assert faults_of("bfloat16", False, {"embeds": math.nan}) and faults_of("bfloat16", False, {"embeds": math.inf})
