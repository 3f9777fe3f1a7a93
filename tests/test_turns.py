"""Several threads and processes, and all that can change between two calls: results are those of running alone."""

import gc
import os
import select
import threading

import mindspore as ms
import numpy as np
import parity
import pytest
from mindspore import mint, ops
from test_pipeline import PICTURE, SOURCE, TARGET, our_pipeline

from mindiffedit import DDIMScheduler, StableDiffusionDiffEditPipeline, load_component
from mindiffedit.arrays import to_numpy
from mindiffedit.runtime import devices, graphs, turns

SHORT = dict(num_inference_steps=4, inpaint_strength=0.5, generator=0)


@pytest.fixture(scope="module")
def ours(sd1_folder):
    return our_pipeline(sd1_folder)


@pytest.fixture(scope="module")
def eager(ours):
    """The same models, operator by operator: nothing of it can be stale."""
    return StableDiffusionDiffEditPipeline(**ours.components, requires_safety_checker=False, mode="pynative")


def sharing(pipe, **others):
    """A pipeline over the same models with a scheduler of its own."""
    parts = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config), **others}
    sister = StableDiffusionDiffEditPipeline(**parts, requires_safety_checker=False)
    sister.set_progress_bar_config(disable=True)
    return sister


def inverted(pipe, prompt=SOURCE, **arguments):
    return to_numpy(pipe.invert(prompt, PICTURE, guidance_scale=2.0, **{**SHORT, **arguments}).latents)


def low_rank(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (2, columns), (rows, 2)
    down, up = (rng.standard_normal(shape).astype(np.float32) / 2 for shape in shapes)
    return {"lora_A": down, "lora_B": up}


QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def load_lora(pipe, seed=0):
    size = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.shape
    pipe.load_lora_weights({f"{QUERY}.{side}.weight": part for side, part in low_rank(*size, seed).items()})


# --- what changes between calls ------------------------------------------------------------------------------------


def embedded(pipe, *prompts):
    return [to_numpy(pipe.encode_prompt(prompt, None, 1, False)[0]) for prompt in prompts]


def test_embeddings_that_come_back_in_another_order(ours, eager):
    width = ours.text_encoder.config.hidden_size
    words = {f"<{word}>": np.random.default_rng(i).standard_normal(width) for i, word in enumerate("ab")}

    def load(*names):
        for name in names:
            ours.load_textual_inversion({name: words[name].astype(np.float32)})

    try:
        load("<a>", "<b>")
        first = embedded(ours, "a <a>", "a <b>")
        ours.unload_textual_inversion()
        load("<b>", "<a>")
        again = embedded(ours, "a <a>", "a <b>")
        assert all(parity.relative(a, b) < 1e-5 for a, b in zip(again, first))
        assert all(parity.relative(a, b) < 1e-5 for a, b in zip(again, embedded(eager, "a <a>", "a <b>")))
        assert parity.relative(*again) > 0.1
    finally:
        ours.unload_textual_inversion()


def by_assign(parameter, values):
    ops.assign(parameter, ms.Tensor(values))


def by_set_data(parameter, values):
    parameter.set_data(ms.Tensor(values))


def by_loading(parameter, values):
    cell = ms.nn.Cell()
    cell.insert_param_to_cell("weight", parameter, check_name_contain_dot=False)
    ms.load_param_into_net(cell, {parameter.name: ms.Parameter(ms.Tensor(values), name=parameter.name)})


def by_hand(parameter, values):
    parameter.asnumpy()[...] = values


def by_index(parameter, values):
    parameter[:] = ms.Tensor(values)


WEIGHTS = {
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "vae": "encoder.conv_in.weight",
    "unet": "conv_in.weight",
}


def test_a_weight_that_the_user_changes_counts_from_the_next_call(ours, eager):
    """Whichever way, and again after a graph was made over the changed one: in graph mode as operator by operator."""
    ways = {
        "text_encoder": [by_assign, by_set_data],
        "vae": [by_set_data, by_set_data, by_loading, by_hand, by_index],
        "unet": [by_assign, by_set_data],
    }
    first = before = inverted(ours)
    for name, chosen in ways.items():
        parameter = dict(getattr(ours, name).parameters_and_names())[WEIGHTS[name]]
        original = parameter.asnumpy().copy()
        try:
            for number, way in enumerate(chosen):
                way(parameter, original * np.float32(1.5 + number))
                after = inverted(ours)
                assert parity.relative(after, inverted(eager)) < 1e-4, (name, way)
                assert parity.relative(after, before) > 1e-3, (name, way)
                before = after
        finally:
            by_set_data(parameter, original)
    assert np.array_equal(inverted(ours), first)


def test_a_layer_that_is_replaced_counts_from_the_next_call(ours, eager, sd2_folder):
    before = inverted(ours)
    layer = ours.unet.conv_in
    other = load_component(sd2_folder, "unet").conv_in
    try:
        ours.unet.conv_in = other
        after = inverted(ours)
        assert parity.relative(after, inverted(eager)) < 1e-4 < 1e-2 < parity.relative(after, before)
    finally:
        ours.unet.conv_in = layer
    assert np.array_equal(inverted(ours), before)


@pytest.mark.parametrize("way", [by_assign, by_set_data])
def test_a_weight_that_is_changed_under_a_lora_is_the_new_original(ours, eager, way):
    parameter = ours.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    original = parameter.asnumpy().copy()
    other = original[::-1].copy()
    try:
        load_lora(ours)
        inverted(ours)
        way(parameter, other)
        ours.set_adapters("default_0", 0.5)
        with_both = inverted(ours)
        assert parity.relative(with_both, inverted(eager)) < 1e-4
        ours.unload_lora_weights()
        assert np.array_equal(parameter.asnumpy(), other)
        assert parity.relative(with_both, inverted(ours)) > 1e-3
    finally:
        ours.unload_lora_weights()
        way(parameter, original)


def test_weights_are_looked_at_once_in_a_call(ours, monkeypatch):
    """All the weights are read at most once for each model and public call, however many stages the call has."""
    from mindiffedit.runtime import reuse

    read = []
    whole = reuse.fingerprint
    monkeypatch.setattr(reuse, "fingerprint", lambda model: read.append(model) or whole(model))
    ours.edit(PICTURE, SOURCE, TARGET, num_maps_per_mask=1, **SHORT)
    assert len(read) == len({id(model) for model in read}) and ours.unet not in read
    monkeypatch.setattr(devices, "device_target", lambda: "Ascend")
    read.clear()
    with turns.turn():
        tokens = ours.tokenizer([SOURCE], padding="max_length", max_length=77, return_tensors="np").input_ids
        calls = ours._stages.calls["text"]
        for _ in range(2):
            ours._stages.encode_text(tokens, None, None)
        assert ours._stages.calls["text"] == calls + 1
    ours._stages.encode_text(tokens, None, None)
    assert ours._stages.calls["text"] == calls + 2 and not read, "on an accelerator nothing is brought to the host"


# --- threads -------------------------------------------------------------------------------------------------------


def in_threads(*jobs, turns_each=3):
    """Runs every job several times in a thread of its own, all at once; returns their results, and errors."""
    results, errors = [[] for _ in jobs], []

    def work(i):
        for _ in range(turns_each):
            try:
                results[i].append(jobs[i]())
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a deadlock"
    assert not errors, errors
    return results


def test_threads_get_what_they_would_get_alone(ours):
    """One pipeline, and another over the same models with other LoRA scales, solver and size, all at once."""
    sister = sharing(ours)
    load_lora(ours)
    seen = []

    def edit():
        done = ours.edit(PICTURE, SOURCE, TARGET, num_maps_per_mask=1, **SHORT)
        return np.asarray(done.images[0])

    def invert(pipe, scale, **arguments):
        return lambda: inverted(pipe, cross_attention_kwargs={"scale": scale}, **arguments)

    def watched():
        with ours.debugging(lambda stage, array, step: seen.append(array.shape)):
            return inverted(ours, inpaint_strength=0.5)

    jobs = [edit, invert(ours, 1.0), invert(sister, 0.0), invert(sister, -0.5, num_inference_steps=6), watched]
    try:
        alone = [job() for job in jobs]
        shapes, turns_each = list(seen), 2
        seen.clear()
        for expected, results in zip(alone, in_threads(*jobs, turns_each=turns_each)):
            assert len(results) == turns_each and all(np.array_equal(result, expected) for result in results)
        assert seen == shapes * turns_each, "a debugging callback sees its own thread's calls"
    finally:
        ours.unload_lora_weights()


def test_a_callback_may_wait_for_another_thread_and_change_what_it_uses(ours):
    """There the turn is given up; what the other thread does with shared models and schedulers does not count here."""
    sister = sharing(ours, scheduler=ours.scheduler)
    alone, others = inverted(ours), []

    def callback(*_):
        thread = threading.Thread(
            target=lambda: others.append(inverted(sister, num_inference_steps=5, inpaint_strength=0.4))
        )
        thread.start()
        thread.join(60)
        assert not thread.is_alive(), "a deadlock"

    assert np.array_equal(inverted(ours, callback=callback), alone)
    assert len(others) == 2 and all(np.array_equal(other, others[0]) for other in others)


def test_kernels_are_replaced_only_while_something_is_compiled(ours):
    """Another thread's own programs see MindSpore as it is, while an edit runs that was compiled before."""
    originals = mint.nn.functional.silu, mint.nn.Linear.construct
    inverted(ours)
    seen = []
    stages = ours._stages
    runs = {}
    for place, one in stages.graphs._graphs.items():
        runs[place] = one.run

        def run(*arguments, original=one.run):
            seen.append((mint.nn.functional.silu, mint.nn.Linear.construct) == originals)
            return original(*arguments)

        one.run = run
    try:
        inverted(ours)
    finally:
        for place, one in stages.graphs._graphs.items():
            one.run = runs[place]
    assert len(seen) >= 4 and all(seen)


# --- memory and processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_the_graphs_used_longest_ago_go_and_come_back(cached, tmp_path):
    from mindspore.common import api

    from mindiffedit.runtime.compile_cache import CompileCache

    def double(tensor):
        return tensor * 2

    cache = CompileCache(tmp_path) if cached else None
    kept = graphs.Graphs(cache, limit=3)
    run = kept.compiled(double, ("double",))

    def held():
        return sum(phase.startswith(f"{__name__}.double.") for phase in api.ms_compile_cache)

    for size in [*range(1, 7), 1, 2, 6]:
        assert run(ms.Tensor(np.ones(size, np.float32))).asnumpy().tolist() == [2] * size
        assert len(kept) <= 3
    assert held() == 3, "MindSpore holds no more than we do"
    with devices.CompileCounter() as compiled:
        for size in (6, 1, 2):
            run(ms.Tensor(np.ones(size, np.float32)))
    assert compiled.count == 0, "the last three are there"
    kept.clear()
    assert len(kept) == held() == 0


def test_graphs_go_with_their_pipeline(sd1_folder):
    """In the next turn of any other: they would hold their weights for as long as the process lives."""
    from mindspore.common import api

    before, pipe = set(api.ms_compile_cache), our_pipeline(sd1_folder)
    inverted(pipe)
    phases, other = set(api.ms_compile_cache) - before, sharing(pipe)
    pipe = None
    gc.collect()
    inverted(other)
    assert len(phases) >= 4 and not phases & set(api.ms_compile_cache)


def test_a_forked_child_is_told_what_to_do_instead(ours):
    inverted(ours)
    for call in (lambda: inverted(ours), lambda: DDIMScheduler.from_config(ours.scheduler.config)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                call()
                os.write(writing, b"done")
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode()[:300])
            os._exit(0)
        ready, _, _ = select.select([reading], [], [], 60)
        told = os.read(reading, 400).decode() if ready else "nothing: it hangs"
        if not ready:
            os.kill(child, 9)
        os.waitpid(child, 0)
        assert told.startswith("RuntimeError") and "get_context('spawn')" in told


def test_a_child_of_a_process_that_has_run_nothing_may_load():
    """Which is what the message says: forked before anything has run, the child works."""
    import subprocess
    import sys

    program = (
        "import os, mindspore as ms\n"
        "from mindiffedit.runtime import turns\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    with turns.turn():\n"
        "        os._exit(0 if (ms.Tensor([1.0]) + 1).asnumpy()[0] == 2 else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 0
