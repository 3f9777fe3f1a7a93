"""Compile and run all graphs that a user can reach, for a device; the program that audit_devices.py starts.

The pipeline is called as a user calls it, on tiny inputs; what it compiles is seen where it compiles, in
`mindiffedit.runtime.graphs`. Results mean nothing on a stand-in, so checks of values are off.

The one argument is a JSON object:

- target, dtype;
- checkpoint: a folder. second: a checkpoint of another layout; lora: a file for the first; prompt and caption: models
  that write text. What is absent is left out;
- size: side of the picture, in pixels;
- scope: "edit" (the calls of an edit), "quick" (its three calls, all solvers) or "whole" (everything);
- planted: whether defects are planted as well;
- export: an empty folder. Instead of the scenarios the case of a golden file, case, is replayed, or without one an edit
  is made, and every graph is written to the folder as a MindIR; it gives zeros in place of results.

Each line on stdout that begins with "RECORD " is a JSON object with a "kind": "graph", "scenario" or "missing".
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from device_kernels import EAGER, HEADING
from mindspore import mint, nn, ops
from mindspore.train.mind_ir_pb2 import ModelProto, TensorProto
from PIL import Image

from mindiffedit import Captioner, Generator, PromptGenerator, StableDiffusionDiffEditPipeline, options, solvers
from mindiffedit.masks import NO_DIFFERENCE
from mindiffedit.parity import golden, replay
from mindiffedit.parity.case import Case
from mindiffedit.runtime import devices, kernels
from mindiffedit.runtime.graphs import Graphs
from mindiffedit.solvers import schedulers
from mindiffedit.stages import host
from mindiffedit.text import decoding

IR = Path("ir")
"""Where MindSpore writes its graphs, in the folder that the program runs in."""

STEPS = dict(num_inference_steps=3, inpaint_strength=0.8)
SOURCE, TARGET = "a red apple", "a yellow pear"

ASTYPE = ms.Tensor.astype

UNREPLACED = mint.nn.functional.gelu
"""mint's own, whatever stands in its place later."""


def say(kind: str, **content) -> None:
    print("RECORD " + json.dumps({"kind": kind, **content}), flush=True)


def first_words(error: BaseException) -> str:
    """What the compiler says, of the many lines in which it says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" -")]
    sentence = next((line for line in lines if "nsupported" in line or "annot" in line), " ".join(lines[:3]))
    return f"{type(error).__name__}: {sentence}"[:300]


# --- seen where it compiles -------------------------------------------------------------------------------------


def place_of(key, arguments) -> str:
    """What a graph is called: its stage and choices, and the shapes of its arguments."""
    choices = " ".join(str(part) for part in key if part not in (None, ()))
    return f"{choices} {' '.join('x'.join(map(str, argument.shape)) or '1' for argument in arguments)}"


class RecordedGraphs(Graphs):
    """Graphs that say of each what it is, the first time it runs."""

    prefix = ""
    seen: set[str] = set()

    def compiled(self, function: Callable, key, model: Any = None) -> Callable:
        run = super().compiled(function, key, model)

        def recorded(*arguments):
            place = self.prefix + place_of(key, arguments)
            if place in self.seen:
                return run(*arguments)
            self.seen.add(place)
            devices.synchronize()
            before, error = set(IR.glob("graph_build_*.ir")), None
            os.write(2, f"\n{HEADING}{place}\n".encode())
            ms.runtime.reset_max_memory_allocated()
            began = time.perf_counter()
            try:
                result = run(*arguments)
                devices.synchronize()
                return result
            except Exception as problem:
                error = first_words(problem)
                raise
            finally:
                say(
                    "graph",
                    name=place,
                    error=error,
                    seconds=round(time.perf_counter() - began, 1),
                    memory=ms.runtime.max_memory_allocated(),
                    files=sorted(str(file) for file in set(IR.glob("graph_build_*.ir")) - before),
                )
                os.write(2, f"\n{HEADING}{EAGER}\n".encode())

        return recorded


# --- what a user does -------------------------------------------------------------------------------------------

Scenario = tuple[str, int, Callable[[], Any]]
"""Name, how many graphs it compiles that no scenario before it has, and what is done."""


def scenarios(wanted: dict) -> Iterator[Scenario]:
    image = picture(wanted["size"])
    pipe = load(wanted["checkpoint"], wanted)
    # Text, encoder, what the UNet makes of timesteps and texts, UNet and update with guidance, decoder.
    yield "an edit in three calls", 7, lambda: (find_mask(pipe, image), there_and_back(pipe, image))
    yield "the same again", 0, lambda: (find_mask(pipe, image), there_and_back(pipe, image))
    if wanted["scope"] != "quick":
        # Its inversion is without guidance: half of the rows for the UNet and its texts, another update.
        yield "an edit in one call", 3, lambda: edit(pipe, image, preset="exact")
        yield "inversion by points", 2, lambda: edit(pipe, image, preset="balanced")
        yield "refined inversion", 1, lambda: edit(pipe, image, preset="exact", inversion_iterations=1)
        yield "step cache", 2, lambda: edit(pipe, image, preset="exact", unet_cache_interval=2)
    if wanted["scope"] == "edit":
        return
    for solver in solvers.CLASSES:
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            choices = (pipe, solver, prediction_type)  # the first of them clips, as no scenario before did
            yield f"{solver}, {prediction_type}", 1, partial(with_solver, *choices, image)
    if wanted["scope"] == "quick":
        return
    yield "clip_skip", 1, lambda: pipe.encode_prompt(SOURCE, "cpu", 1, False, clip_skip=1)
    if "lora" in wanted:
        yield "LoRA", 0, lambda: (pipe.load_lora_weights(wanted["lora"]), there_and_back(pipe, image))
    yield "FreeU", 1, lambda: (pipe.enable_freeu(0.9, 0.2, 1.5, 1.6), there_and_back(pipe, image))
    if pipe.safety_checker is not None:
        yield "safety checker", 1, lambda: check(pipe.safety_checker)
    if "second" in wanted:
        second = load(wanted["second"], wanted)
        RecordedGraphs.prefix = "2.x: "
        yield "layout of 2.x", 7, lambda: (find_mask(second, image), there_and_back(second, image))
        RecordedGraphs.prefix = ""
    if "prompt" in wanted:
        writer = PromptGenerator.from_pretrained(wanted["prompt"], mindspore_dtype=wanted["dtype"], compile_cache=False)
        yield "Flan-T5", 1, lambda: writer.generate("apples", num_prompts=2, max_new_tokens=2, generator=0)
    if "caption" in wanted:
        captioner = Captioner.from_pretrained(wanted["caption"], mindspore_dtype=wanted["dtype"], compile_cache=False)
        yield "BLIP", 1, lambda: captioner.caption(image, max_new_tokens=2)


def load(folder: str, wanted: dict) -> StableDiffusionDiffEditPipeline:
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(
        folder, mindspore_dtype=wanted["dtype"], compile_cache=False, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe._stages.graphs = RecordedGraphs()
    return pipe


def picture(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def find_mask(pipe, image) -> None:
    """Step 1. Where a stand-in makes everything zero there is no difference, which is no fault here."""
    try:
        pipe.generate_mask(
            image=image,
            source_prompt=SOURCE,
            target_prompt=TARGET,
            num_maps_per_mask=2,
            generator=Generator().manual_seed(0),
        )
    except options.NumericalError as error:
        if str(error) != NO_DIFFERENCE:
            raise


def upper_half(pipe, image) -> np.ndarray:
    area = np.zeros((image.height // pipe.vae_scale_factor, image.width // pipe.vae_scale_factor), np.float32)
    area[: len(area) // 2] = 1
    return area


def there_and_back(pipe, image):
    """Steps 2 and 3, with guidance in both; returns the picture, (1, H, W, 3) float32 in [0, 1]."""
    inverted = pipe.invert(image=image, prompt=SOURCE, generator=Generator().manual_seed(0), **STEPS)
    latents = np.nan_to_num(host(inverted.latents))  # a stand-in's memory may hold anything
    prompts = dict(prompt=TARGET, negative_prompt=SOURCE)
    mask = upper_half(pipe, image)
    return pipe(**prompts, mask_image=mask, image_latents=latents, output_type="np", **STEPS).images


def edit(pipe, image, **choices) -> None:
    """All in one call, of a mask that is given."""
    pipe.edit(
        image,
        source_prompt=SOURCE,
        target_prompt=TARGET,
        mask_image=upper_half(pipe, image),
        generator=Generator().manual_seed(0),
        **STEPS,
        **choices,
    )


def with_solver(pipe, solver: str, prediction_type: str, image) -> None:
    clips = (solver, prediction_type) == ("ddim", "epsilon")
    config = {**pipe.scheduler.config, "prediction_type": prediction_type, "clip_sample": clips}
    before = pipe.scheduler, pipe.inverse_scheduler
    pipe.scheduler, pipe.inverse_scheduler = (schedulers.make(name, config) for name in solvers.CLASSES[solver])
    try:
        there_and_back(pipe, image)
    finally:
        pipe.scheduler, pipe.inverse_scheduler = before


def check(checker) -> None:
    """The safety checker runs operator by operator, as it did in the edits; here as a graph, whose nodes are listed."""

    def embeds(pixels):
        return checker.visual_projection(checker.vision_model(pixels)[1])

    side = checker.config.vision_config.image_size
    pixels = ms.Tensor(np.zeros((1, 3, side, side), np.float32)).astype(checker.dtype)
    RecordedGraphs().compiled(embeds, ("safety checker",), checker)(pixels)


# --- planted defects --------------------------------------------------------------------------------------------


def planted(wanted: dict) -> Iterator[Scenario]:
    """Scenarios of which none may pass."""
    graphs = RecordedGraphs()
    graphs.prefix = "planted: "
    halves = ms.Tensor(np.zeros((4, 4), np.float32)).astype(getattr(ms, wanted["dtype"]))
    integers = ms.Tensor(np.zeros((4, 4), np.int8))

    def run(name, function, *arguments):
        return f"planted: {name}", 1, lambda: graphs.compiled(function, (name,))(*arguments)

    yield run("one graph more", doubled, halves)  # its first graph; the second is the defect
    yield "planted: one graph more", 0, lambda: graphs.compiled(doubled, ("one graph more",))(halves[:2])
    if wanted["target"] == "Ascend":
        yield run("float64", in_float64, halves)
        yield run("asked of CANN by name", mish, halves)
        if wanted["dtype"] == "float32":
            yield run("half precision", in_float16, halves)
    else:
        yield run("moved to the CPU", squared, integers)
        yield run("a kernel that nobody replaced", unreplaced, halves)
    yield run("an operator that nobody has", no_such_operator(), halves)


def doubled(x):
    return x + x


def squared(x):
    return ops.matmul(x, x)


def in_float64(x):
    return ops.exp(x.astype(ms.float64))


def in_float16(x):
    return ops.exp(x.astype(ms.float16))


def mish(x):
    return ops.mish(x)


def unreplaced(x):
    return UNREPLACED(x)


def no_such_operator() -> Callable:
    class NoSuchOperator(ops.PrimitiveWithInfer):
        @ops.prim_attr_register
        def __init__(self):
            self.init_prim_io_names(inputs=["x"], outputs=["y"])

        def infer_shape(self, shape):
            return shape

        def infer_dtype(self, dtype):
            return dtype

    operator = NoSuchOperator()

    def call(x):
        return operator(x)

    return call


# --- exported, to be replayed -----------------------------------------------------------------------------------


class ExportedGraphs(Graphs):
    """Graphs that are written as MindIR, with their weights, and not run: they give zeros.

    Not run, because what a weight is after a dry run nobody knows.

    Args:
        folder: for the files, whose numbers its index.json has by the graphs' names.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.index = folder, {}
        self.zeros: dict[str, Any] = {}

    def compiled(self, function: Callable, key, model: Any = None) -> Callable:
        class Stage(nn.Cell):
            def __init__(self):
                super().__init__(auto_prefix=False)
                self.model = model  # whose weights are written

            def construct(self, *inputs):
                return function(*inputs)

        def run(*arguments):
            place = place_of(key, arguments)
            if place not in self.zeros:
                file = self.folder / f"{len(self.zeros)}.mindir"
                before = ms.get_context("mode")
                ms.set_context(mode=ms.GRAPH_MODE)
                with kernels.portable_kernels():
                    ms.export(Stage(), *arguments, file_name=str(file), file_format="MINDIR")
                ms.set_context(mode=before)
                self.zeros[place] = zeros_of(file)
                self.index[place] = file.name
                (self.folder / "index.json").write_text(json.dumps(self.index, indent=1))
            return self.zeros[place]

        return run


def zeros_of(file: Path):
    """Zeros of the shapes and dtypes of what a MindIR gives; a tuple of tensors, or one."""
    model = ModelProto()
    model.ParseFromString(file.read_bytes())
    last = next(node for node in reversed(model.graph.node) if model.graph.output[0].name in node.output)
    given = next(attribute for attribute in last.attribute if attribute.name == "shape")
    protos = [value.tensors[0] for value in given.values] or list(given.tensors)
    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    zeros = [
        ms.Tensor(np.zeros(tuple(proto.dims), np.float32)).astype(getattr(ms, names[proto.data_type]))
        for proto in protos
    ]
    return tuple(zeros) if given.values else zeros[0]


def count_positions(text_encoder) -> None:
    """CLIP counts its positions on the device, where a dry run leaves them at zero; here on the host."""
    for _, cell in text_encoder.cells_and_names():
        if getattr(cell, "position_ids", None) is not None:
            count = cell.position_ids.shape[-1]
            cell.position_ids = ms.Tensor(np.arange(count)[None], cell.position_ids.dtype)


def export(wanted: dict) -> None:
    """Exports the graphs of a golden file's case, which is replayed from the reference's inputs, or of an edit."""
    graphs = ExportedGraphs(Path(wanted["export"]))
    if "case" not in wanted:
        pipe = load(wanted["checkpoint"], wanted)
        pipe._stages.graphs = graphs
        count_positions(pipe.text_encoder)
        there_and_back(pipe, picture(wanted["size"]))
        return
    recording = golden.read_golden(wanted["case"])
    images = [Image.fromarray(pixels) for pixels in recording.inputs["picture"]]
    case = Case(image=images if len(images) > 1 else images[0], **recording.manifest["calls"])
    pipe = replay.load(Path(wanted["checkpoint"]), case, "graph", wanted["dtype"], compile_cache=False)
    pipe._stages.graphs = graphs
    count_positions(pipe.text_encoder)
    replay.run(pipe, case, recording.trace, isolate=True)


# --- the program ------------------------------------------------------------------------------------------------


def run(name: str, expected: int, action: Callable[[], Any]) -> None:
    error = None
    with devices.CompileCounter() as compiled:
        try:
            action()
        except Exception as problem:
            error = first_words(problem)
            traceback.print_exc()
    say("scenario", name=name, expected=expected, compiled=compiled.count, error=error)


def converted(self, dtype) -> ms.Tensor:
    """On the host: bfloat16 weights are float32 ones, which are else converted on the device."""
    return ms.Tensor(self.asnumpy(), dtype) if self.dtype == ms.float32 else ASTYPE(self, dtype)


def subtracted(self, other) -> ms.Tensor:
    """On the host, where mindone's schedulers count their timesteps by it: on a stand-in nothing comes of that."""
    return ms.Tensor(np.asarray(other - self.asnumpy()))


def main() -> None:
    wanted = json.loads(sys.argv[1])
    ms.set_device(wanted["target"])
    options.check_finite = lambda *_: None
    ms.Tensor.__rsub__ = subtracted
    if "export" in wanted:
        ms.Tensor.astype = converted
        export(wanted)
        return
    decoding.Graphs = RecordedGraphs
    say("missing", names=kernels.missing_kernels())
    for scenario in scenarios(wanted):
        run(*scenario)
    if wanted["planted"]:
        for scenario in planted(wanted):
            run(*scenario)


if __name__ == "__main__":
    main()
