"""What is recorded and replayed, `Case`, and what watches both, `Tape`. Neither framework is needed."""

import json

import numpy as np
import pytest

from mindiffedit import options
from mindiffedit.parity import replay
from mindiffedit.parity.case import CALLS, Case, Tape


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


def tape_of(call="mask", substitutes=None):
    tape = Tape(substitutes)
    tape.call = call
    return tape


# --- Tape ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_in_the_order_of_first_appearance():
    tape = tape_of()
    tape("moments", array(1))
    tape("noise", array(5))
    tape("moments", array(2))  # computed again: kept as it was last
    tape.call = "invert"
    for step in range(2):
        tape("step_noise", array(step), step)
        tape("inverted_latents", array(step), step)
    tape("decoded", array(2))
    tape.call = "edit"
    tape("moments", array(3))
    trace = tape.trace()
    names = ["mask/moments", "mask/noise", "invert/step_noise", "invert/inverted_latents", "invert/decoded"]
    assert list(trace) == [*names, "edit/moments"]
    assert trace["mask/moments"] == 2 and trace["edit/moments"] == 3


def test_steps_are_stacked_and_other_stages_are_not():
    tape = tape_of()
    for step in range(3):
        tape("latents", np.full((2, 4), step, np.float32), step)
        trace = tape.trace()
        assert trace["mask/latents"].shape == (step + 1, 2, 4)
    tape("decoded", np.zeros((2, 4), np.float32))
    assert isinstance(tape("timesteps", [3, 2, 1]), np.ndarray)
    tape("timestep", 981)
    trace = tape.trace()
    assert trace["mask/latents"].dtype == np.float32 and trace["mask/latents"][:, 0, 0].tolist() == [0, 1, 2]
    assert trace["mask/decoded"].shape == (2, 4)
    assert trace["mask/timestep"].shape == () and trace["mask/timestep"] == 981


def test_the_tape_has_copies():
    tape = tape_of()
    whole, stepped, kept = array(1, 2), array(3, 4), array(5, 6)
    assert tape("moments", whole) is whole  # nothing is copied on the way through
    tape("latents", stepped, 0)
    tape.keep("picture", kept)
    for one in (whole, stepped, kept):
        one[:] = -1
    trace = tape.trace()
    assert trace["mask/moments"].tolist() == [1, 2]
    assert trace["mask/latents"].tolist() == [[3, 4]]
    assert trace["mask/picture"].tolist() == [5, 6]


def test_what_is_substituted_goes_on_and_what_was_there_is_kept():
    stored = {"invert/moments": array(7, 8)}
    tape = tape_of("invert", stored)
    seen = tape("moments", array(1, 2))
    assert seen.tolist() == [7, 8] and tape.trace()["invert/moments"].tolist() == [1, 2]
    seen[:] = 0  # of whoever takes it: the next call gets the stored values again
    assert tape("moments", array(1, 2)).tolist() == stored["invert/moments"].tolist() == [7, 8]
    tape.keep("moments", array(3, 4))
    assert tape.trace()["invert/moments"].tolist() == [3, 4]
    for call, stage in (("mask", "moments"), ("invert", "latents")):  # of another call or stage
        tape.call = call
        assert tape(stage, array(1)).tolist() == [1] and tape.substitute(stage) is None


def test_steps_are_substituted_one_by_one():
    tape = tape_of("edit", {"edit/edited_latents": array([10, 11], [20, 21])})
    seen = [tape("edited_latents", array(step, step), step).tolist() for step in range(3)]
    assert seen == [[10, 11], [20, 21], [2, 2]]  # there are two steps to put in place
    assert tape.substitute("edited_latents", 1).tolist() == [20, 21]
    assert tape.substitute("edited_latents", 2) is None
    assert tape.trace()["edit/edited_latents"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_substitute_has_the_shape_and_takes_the_dtype_of_the_stage():
    tape = tape_of(substitutes={"mask/moments": array(0.1), "mask/mask": array(1.0), "mask/latents": array([1], [2])})
    own, step = array(5, 6), array(7, 8)
    assert tape("moments", own) is own and tape("latents", step, 0) is step  # of another shape: left out
    double = tape("moments", array(5, dtype=np.float64))
    assert double.dtype == np.float64 and double == np.float64(np.float32(0.1))
    assert tape("mask", array(0, dtype=np.int64)).dtype == np.int64


# --- Case ---------------------------------------------------------------------------------------------------------


def test_the_inverse_belongs_to_the_scheduler():
    for scheduler, inverse in (
        ("DDIMScheduler", "DDIMInverseScheduler"),
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
        ("EulerDiscreteScheduler", "DDIMInverseScheduler"),
    ):
        assert Case(image=None, scheduler=scheduler).inverse_scheduler == inverse


def test_a_described_case_can_be_made_again():
    case = Case(
        image=object(),
        mask=dict(source_prompt=["a", "b"], guidance_scale=2.5, source_negative_prompt=None),
        edit=dict(prompt="c", eta=0.5),
        seeds={"mask": [1, 2**64 - 1], "invert": [3], "edit": -4},
        scheduler="DPMSolverMultistepScheduler",
        scheduler_options={"solver_order": 1},
    )
    described = case.described()
    assert "image" not in described and described["invert"] is None
    assert Case(image=case.image, **json.loads(json.dumps(described))) == case
    first, second = Case(image=None), Case(image=None)
    first.seeds["mask"] = 5
    assert second.seeds == dict.fromkeys(CALLS, 0)


# --- a replay that ends early ---------------------------------------------------------------------------------------


def test_an_error_on_the_way_brings_what_there_was_before_it(monkeypatch):
    class Pipeline:
        observer = "the user's own"

        def generate_mask(self, **arguments):
            self.observer("moments", array(1))
            raise options.NumericalError("the mask is not finite")

    monkeypatch.setattr(replay, "_arguments", dict)
    pipe = Pipeline()
    with pytest.raises(options.NumericalError) as caught:
        replay.run(pipe, Case(image=None, mask={}))
    assert caught.value.trace == {"mask/moments": array(1)}
    assert pipe.observer == "the user's own"
