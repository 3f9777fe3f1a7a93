"""Errors about input: one sentence, in the names of whichever interface shows it."""

import pickle

import pytest

from mindiffedit.errors import MAX_VALUE_LENGTH, InputError, InputTypeError, Message


def test_a_message_names_parameters_as_each_interface_does():
    error = InputError(
        "{parameter} has to be at least 1, but is {value!r}; {inpaint_strength} decides, too.",
        parameter="num_inference_steps",
        value=0,
    )
    said = "`num_inference_steps` has to be at least 1, but is 0; `inpaint_strength` decides, too."
    assert (str(error), error.parameter) == (said, "num_inference_steps")
    options = {"num_inference_steps": "--steps", "inpaint_strength": "--strength"}
    assert error.message.told(options.get) == "--steps has to be at least 1, but is 0; --strength decides, too."


def test_values_are_never_taken_for_names_or_fields():
    text = "a {strange} `steps` {0} {"
    assert str(InputError("{parameter} is {value}.", parameter="prompt", value=text)) == f"`prompt` is {text}."
    assert str(InputError(text)) == text
    assert InputError(text).message.told(str.upper) == text


def test_long_values_are_cut_and_their_length_is_said():
    said = str(InputError("{parameter} is {value!r}.", parameter="prompt", value="x" * 5000))
    assert len(said) < MAX_VALUE_LENGTH + 60 and "5002 characters" in said


def test_errors_are_value_and_type_errors_and_survive_a_process_boundary():
    for kind, base in ((InputError, ValueError), (InputTypeError, TypeError)):
        error = pickle.loads(pickle.dumps(kind("{parameter} is {value}.", parameter="image", value="{x")))
        assert isinstance(error, base) and type(error) is kind
        assert (str(error), error.parameter) == ("`image` is {x.", "image")
        assert error.message.told(lambda name: "PICTURE") == "PICTURE is {x."
    with pytest.raises(ValueError):
        raise InputError("no")


def test_a_message_without_values_is_a_plain_sentence():
    assert Message("Nothing is left.") == "Nothing is left."
