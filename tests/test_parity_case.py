"""What is recorded and replayed, `Case`, and what watches both, `Tape`. Neither framework is needed."""

import json

import numpy as np
import pytest

from mindiffedit import options
from mindiffedit.parity import replay
from mindiffedit.parity.case import CALLS, Case, Tape


def array(*values, dtype=np.float32):
    return np.array(values, dtype)


@pytest.fixture
def tape():
    tape = Tape()
    tape.call = "mask"
    return tape


# --- Tape ---------------------------------------------------------------------------------------------------------


def test_a_trace_is_in_the_order_of_first_appearance(tape):
    tape("moments", array(1))
    tape.call = "invert"
    for step in range(2):
        tape("step_noise", array(step), step)
        tape("inverted_latents", array(step), step)
    tape("decoded", array(2))
    tape.call = "edit"
    tape("moments", array(3))
    names = ["mask/moments", "invert/step_noise", "invert/inverted_latents", "invert/decoded", "edit/moments"]
    assert list(tape.trace()) == names


def test_steps_are_stacked_and_other_stages_are_not(tape):
    for step in range(3):
        tape("latents", np.full((2, 4), step, np.float32), step)
    tape("decoded", np.zeros((2, 4), np.float32))
    tape("timestep", np.asarray(981))
    trace = tape.trace()
    assert trace["mask/latents"].shape == (3, 2, 4) and trace["mask/latents"].dtype == np.float32
    assert trace["mask/latents"][:, 0, 0].tolist() == [0, 1, 2]
    assert trace["mask/decoded"].shape == (2, 4)
    assert trace["mask/timestep"].shape == () and trace["mask/timestep"] == 981
    tape("latents", np.full((2, 4), 9, np.float32), 3)
    assert trace["mask/latents"].shape == (3, 2, 4) and tape.trace()["mask/latents"].shape == (4, 2, 4)


def test_one_step_is_a_stack_of_one(tape):
    tape("latents", array(1, 2), 0)
    assert tape.trace()["mask/latents"].shape == (1, 2)


def test_a_stage_that_is_computed_again_is_kept_as_it_was_last(tape):
    tape("moments", array(1))
    tape("noise", array(5))
    tape("moments", array(2))
    assert list(tape.trace()) == ["mask/moments", "mask/noise"] and tape.trace()["mask/moments"] == 2


def test_the_tape_has_copies(tape):
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


def test_lists_and_numbers_become_arrays(tape):
    assert isinstance(tape("timesteps", [3, 2, 1]), np.ndarray)
    assert tape("timestep", 7).shape == ()


def test_what_is_substituted_goes_on_and_what_was_there_is_kept():
    stored = {"invert/moments": array(7, 8)}
    tape = Tape(stored)
    tape.call = "invert"
    seen = tape("moments", array(1, 2))
    assert seen.tolist() == [7, 8] and tape.trace()["invert/moments"].tolist() == [1, 2]
    seen[:] = 0  # of whoever takes it: the next call gets the stored values again
    assert stored["invert/moments"].tolist() == [7, 8]
    assert tape("moments", array(1, 2)).tolist() == [7, 8]


def test_a_substitute_is_of_one_call_and_one_stage():
    tape = Tape({"invert/moments": array(7)})
    for call, stage in (("mask", "moments"), ("invert", "latents")):
        tape.call = call
        assert tape(stage, array(1)).tolist() == [1]
        assert tape.substitute(stage) is None


def test_steps_are_substituted_one_by_one():
    tape = Tape({"edit/edited_latents": array([10, 11], [20, 21])})
    tape.call = "edit"
    seen = [tape("edited_latents", array(step, step), step).tolist() for step in range(3)]
    assert seen == [[10, 11], [20, 21], [2, 2]]  # there are two steps to put in place
    assert tape.substitute("edited_latents", 1).tolist() == [20, 21]
    assert tape.substitute("edited_latents", 2) is None
    assert tape.trace()["edit/edited_latents"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_a_substitute_of_another_shape_is_left_out():
    tape = Tape({"mask/moments": array(1, 2, 3), "mask/latents": array([1], [2])})
    tape.call = "mask"
    own, step = array(5, 6), array(7, 8)
    assert tape("moments", own) is own and tape("latents", step, 0) is step


def test_a_substitute_takes_the_dtype_of_the_stage():
    tape = Tape({"mask/moments": array(0.1, dtype=np.float32), "mask/mask": array(1.0)})
    tape.call = "mask"
    double = tape("moments", array(5, dtype=np.float64))
    assert double.dtype == np.float64 and double == np.float64(np.float32(0.1))
    assert tape("mask", array(0, dtype=np.int64)).dtype == np.int64


def test_keeping_substitutes_nothing():
    tape = Tape({"mask/map": array(9)})
    tape.call = "mask"
    assert tape.keep("map", array(1)) is None
    assert tape.trace()["mask/map"] == 1 and tape.substitute("map") == 9


# --- Case ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler, inverse",
    [
        ("DDIMScheduler", "DDIMInverseScheduler"),
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
        ("EulerDiscreteScheduler", "DDIMInverseScheduler"),
    ],
)
def test_the_inverse_belongs_to_the_scheduler(scheduler, inverse):
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


def test_cases_share_no_seeds():
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
