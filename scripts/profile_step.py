"""Where the time of one UNet evaluation goes, operator by operator: ours, and torch's beside it.

    python scripts/profile_step.py --model demo --size 128
    python scripts/profile_step.py --size 512 --batch 2 --json profile.json

Ours: MindSpore's profiler, which works on CPU, over an inversion without guidance whose latents and embeddings
are given, so that nothing runs but the UNet and the scheduler's update, compiled as in real use. It reports
each launch of each kernel with the shapes of its inputs. torch: `torch.profiler` over the UNet of diffusers.
Both run in processes of their own.

Two tables come out. Families (convolution, products, normalisation, ...) compare the two libraries as they
are, fused operators of one against several of the other. Operators lists ours by the time they take; where
torch has the same operator, it is timed alone, with inputs of the same shapes, and stands beside it with the
ratio (ours over torch). An operator alone finds its inputs in the caches more often than in a model, so that
column is a lower bound. Times are of the clock; run this on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import benchmark  # noqa: E402
import benchmark_report as report  # noqa: E402
import benchmark_worker as worker  # noqa: E402

FAMILIES = (
    ("convolution", r"conv|biasadd|unfold|im2col"),
    ("matrix product", r"matmul|addmm|::mm|bmm|::linear|gemm|dense"),
    ("attention (fused)", r"attention|flash"),
    ("softmax", r"softmax"),
    ("normalisation", r"norm|var_mean"),
    ("activation", r"silu|gelu|erf|sigmoid|swish|geglu|::tanh"),
    ("arithmetic", r"add|sub|mul|div|::pow|sqrt|exp|sin|cos|neg|square"),
    (
        "layout and copies",
        r"transpose|concat|::cat|split|slice|copy|clone|contiguous|pad|tile|broadcast|stack",
    ),
    ("resize", r"resize|upsample|interpolate"),
    ("types", r"cast|::to"),
)
"""Names of kernels of either library, lower case, that belong together; the first that fits counts."""


def family(kernel: str) -> str:
    for name, pattern in FAMILIES:
        if re.search(pattern, kernel.lower()):
            return name
    return "other"


# --- ours: MindSpore's profiler -------------------------------------------------------------------


def read_kernels(folder: Path) -> list[dict]:
    """Kernels from MindSpore's profile: {"kernel", "name", "shapes", "times" (ms, one for each launch)}.

    Two files hold them: one has the times, by full name, the other the shapes, by kernel and short name. A graph's
    shapes do not change from launch to launch.
    """
    shapes = {}
    for path in sorted(folder.rglob("cpu_framework_*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            kernel, name, _, *inputs = line.rstrip(";").split(";")
            # Inputs that are options (a kernel size, an axis) have no shape, scalars an empty one.
            found = [re.findall(r"\d+", text.partition(":")[2]) for text in inputs if "NoShape" not in text]
            shapes[name] = kernel, [[int(size) for size in shape] for shape in found]
    kernels = []
    for path in sorted(folder.rglob("cpu_op_execute_timestamp_*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            full_name, _, launches = line.partition(";HostCpuOps;")
            name = full_name.rpartition("/")[2]
            kernel, sizes = shapes.get(name, (name.partition("-")[0], []))
            times = [float(launch.split(",")[1]) for launch in launches.split() if "," in launch]
            kernels.append({"kernel": kernel, "name": full_name, "shapes": sizes, "times": times})
    return kernels


def grouped(kernels: list[dict], evaluations: int) -> list[dict]:
    """One row for each kernel and shapes: launches and milliseconds for one evaluation, longest first."""
    groups = defaultdict(list)
    for kernel in kernels:
        # Shapes of inputs do not tell a convolution with a stride from one without.
        stride = 2 if kernel["kernel"].startswith("Conv2D") and "ownsample" in kernel["name"] else 1
        groups[kernel["kernel"], json.dumps(kernel["shapes"]), stride] += kernel["times"]
    rows = []
    for (kernel, shapes, stride), times in groups.items():
        count, whole = len(times) / evaluations, sum(times) / evaluations
        rows.append(
            {
                "kernel": kernel,
                "shapes": json.loads(shapes),
                "stride": stride,
                "count": count,
                # The median: one launch that was held up by something else is no property of the kernel.
                "ms_each": statistics.median(times),
                "ms_total": whole,
            }
        )
    return sorted(rows, key=lambda row: -row["ms_total"])


def our_profile(job: dict) -> dict:
    """Kernels of `job["evaluations"]` UNet evaluations; the first, which compiles, is not among them."""
    import mindspore
    import numpy as np

    party = worker.Ours(job)
    pipeline = party.load(job)
    pipeline.set_progress_bar_config(disable=True)
    latents, embeds = inputs(job, pipeline.vae_scale_factor, pipeline.unet.config)

    def invert(steps: int):
        pipeline.invert(
            prompt_embeds=embeds,
            image=latents,
            num_inference_steps=steps,
            inpaint_strength=1.0,
            guidance_scale=1.0,
            generator=0,
        )

    invert(1)
    begun = time.perf_counter()
    invert(job["evaluations"])
    plain = (time.perf_counter() - begun) / job["evaluations"]
    with tempfile.TemporaryDirectory(prefix="mindiffedit-profile-") as place:
        # The profiler runs from its construction on; what it prints must not be our last line.
        profiler = mindspore.profiler.profile(
            activities=[mindspore.profiler.ProfilerActivity.CPU],
            on_trace_ready=mindspore.profiler.tensorboard_trace_handler(place),
        )
        invert(job["evaluations"])
        profiler.stop()
        kernels = read_kernels(Path(place))
    if not kernels:
        raise RuntimeError("MindSpore's profiler wrote no kernels; this release has another format of files")
    return {
        "rows": grouped(kernels, job["evaluations"]),
        "ms": plain * 1000,
        "versions": {**party.versions, "numpy": np.__version__},
    }


def inputs(job: dict, factor: int, config):
    """Latents and embeddings, float32 NumPy, as large as the job's pictures need."""
    import numpy as np

    rng = np.random.default_rng(5)
    side, batch = job["size"] // factor, job["batch"]
    latents = rng.standard_normal((batch, config.in_channels, side, side)).astype(np.float32)
    embeds = rng.standard_normal((batch, 77, config.cross_attention_dim)).astype(np.float32)
    return latents, embeds


# --- torch ----------------------------------------------------------------------------------------


def torch_profile(job: dict) -> dict:
    """torch's operators over the same evaluation, and the time of each of our kernels' counterparts."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(job["threads"])
    channels = AutoencoderKL.load_config(job["model"], subfolder="vae")["block_out_channels"]
    unet = UNet2DConditionModel.from_pretrained(job["model"], subfolder="unet").eval()
    latents, embeds = (torch.from_numpy(array) for array in inputs(job, 2 ** (len(channels) - 1), unet.config))
    moment, evaluations = torch.tensor(500), job["evaluations"]
    with torch.inference_mode():
        unet(latents, moment, embeds)
        begun = time.perf_counter()
        for _ in range(evaluations):
            unet(latents, moment, embeds)
        plain = (time.perf_counter() - begun) / evaluations
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            for _ in range(evaluations):
                unet(latents, moment, embeds)
        rows = [
            {
                "kernel": event.key,
                "shapes": [shape for shape in event.input_shapes if shape],
                "count": event.count / evaluations,
                "ms_each": event.self_cpu_time_total / 1000 / event.count,
                "ms_total": event.self_cpu_time_total / 1000 / evaluations,
            }
            for event in recorded.key_averages(group_by_input_shape=True)
        ]
        del unet  # before the operators alone, which make tensors of their own
        alone = [counterpart_ms(kernel) for kernel in job["kernels"]]
    return {
        "rows": sorted(rows, key=lambda row: -row["ms_total"]),
        "ms": plain * 1000,
        "alone": alone,
        "versions": {"torch": torch.__version__},
    }


def counterpart(kernel: str, stride: int, shapes: list):
    """torch's operator for one of our kernels, ready to be called; None where there is none or it is not clear."""
    import torch
    import torch.nn.functional as F

    tensors = [torch.rand(shape) for shape in shapes]
    first = tensors[0] if tensors else None
    two = len(tensors) >= 2
    if kernel == "Conv2D" and two and tensors[1].ndim == 4:
        padding = tensors[1].shape[-1] // 2
        return lambda: F.conv2d(first, tensors[1], stride=stride, padding=padding)
    if kernel in ("MatMul", "BatchMatMul", "BatchMatMulExt") and two:
        # Which side is transposed is no shape: the one way in which they fit.
        a, b = tensors[:2]
        for x, y in ((a, b.mT), (a, b), (a.mT, b)):
            if x.shape[-1] == y.shape[-2] and x.shape[:-2] == y.shape[:-2]:
                return lambda: torch.matmul(x, y)
    if kernel == "LayerNorm" and two:
        return lambda: F.layer_norm(first, tensors[1].shape, tensors[1], tensors[-1])
    if kernel == "GroupNorm" and two:
        groups = 32 if first.shape[1] % 32 == 0 else 8
        if first.shape[1] % groups == 0:
            return lambda: F.group_norm(first, groups, tensors[1], tensors[-1])
    if kernel == "BiasAdd" and two:
        bias = tensors[1].reshape(-1, *[1] * (first.ndim - 2))
        return lambda: first + bias
    if kernel == "Concat" and two:
        for axis in range(first.ndim):
            rest = [[n for i, n in enumerate(shape) if i != axis] for shape in shapes]
            if all(other == rest[0] for other in rest):
                # Equal shapes fit along any axis: the channels are what a UNet joins.
                axis = 1 if shapes[0] == shapes[1] and first.ndim == 4 else axis
                return lambda: torch.cat(tensors, axis)
    if kernel == "Transpose" and first is not None and first.ndim == 4:
        return lambda: first.transpose(1, 2).contiguous()
    binary = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div, "RealDiv": torch.div}
    if kernel in binary and two:
        return lambda: binary[kernel](first, tensors[1])
    unary = {
        "Softmax": lambda x: torch.softmax(x, -1),
        "SiLU": F.silu,
        "UpsampleNearest2D": lambda x: F.interpolate(x, scale_factor=2.0),
        "ResizeNearestNeighbor": lambda x: F.interpolate(x, scale_factor=2.0),
        "Erf": torch.erf,
        "Sigmoid": torch.sigmoid,
        "GeLU": F.gelu,
        "Cast": lambda x: x.double(),
    }
    if kernel in unary and first is not None:
        return lambda: unary[kernel](first)
    return None


def counterpart_ms(kernel: dict):
    """Milliseconds of torch's counterpart: the median of some calls after one that is not counted; or None."""

    try:
        call = counterpart(kernel["kernel"], kernel["stride"], kernel["shapes"])
        if call is None:
            return None
        call()
        times = []
        while len(times) < 3 or (len(times) < 20 and sum(times) < 0.1):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    except RuntimeError:  # shapes that only look alike
        return None
    return statistics.median(times) * 1000


# --- tables ---------------------------------------------------------------------------------------


def family_rows(ours: list[dict], theirs: list[dict]) -> list[dict]:
    """Milliseconds of each family on both sides; the longest of ours first."""
    sums = defaultdict(lambda: [0.0, 0.0])
    for side, rows in enumerate((ours, theirs)):
        for row in rows:
            sums[family(row["kernel"])][side] += row["ms_total"]
    rows = [{"family": name, "ours_ms": a, "torch_ms": b, "ratio": report.ratio(a, b)} for name, (a, b) in sums.items()]
    return sorted(rows, key=lambda row: -row["ours_ms"])


def shape_text(shapes: list) -> str:
    return " ".join("x".join(map(str, shape)) or "scalar" for shape in shapes)[:60]


def tables(results: dict, lines: int) -> str:
    """Both tables as text; `lines` rows of operators."""
    show, parts = report.show, []
    ours, theirs = results["ours"], results["torch"]
    parts.append(
        f"one evaluation, without the profiler: ours {ours['ms']:.1f} ms, torch {show(theirs and theirs['ms'])} ms"
    )
    cells = [["family", "ours ms", "torch ms", "ours / torch"]]
    for row in results["families"]:
        figures = [show(row["ours_ms"]), show(row["torch_ms"]), show(row["ratio"], "{:.2f} x")]
        cells.append([row["family"], *figures])
    parts.append(report.text_table(cells))
    cells = [["operator", "shapes of its inputs", "count", "ms each", "ms total", "torch ms each", "ours / torch"]]
    for row in ours["rows"][:lines]:
        stride = f", stride {row['stride']}" if row["stride"] > 1 else ""
        cells.append(
            [
                row["kernel"] + stride,
                shape_text(row["shapes"]),
                show(row["count"], "{:g}"),
                show(row["ms_each"], "{:.3f}"),
                show(row["ms_total"], "{:.2f}"),
                show(row.get("torch_ms"), "{:.3f}"),
                show(report.ratio(row["ms_each"], row.get("torch_ms")), "{:.2f} x"),
            ]
        )
    parts.append(report.text_table(cells))
    return "\n\n".join(parts)


# --- the command ----------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="profile_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, add = benchmark.number(int, 1), parser.add_argument
    add("--size", type=benchmark.pixels, default=256, help="pixels on each side of the picture (256)")
    add("--batch", type=count, default=2, help="samples of one evaluation; a guided step has two (2)")
    add("--evaluations", type=count, default=2, help="evaluations to measure, after one that compiles (2)")
    add("--model", metavar="FOLDER", help="a checkpoint, or 'demo', instead of the random one of benchmark.py")
    add("--checkpoint-folder", type=Path, metavar="FOLDER", help="where the random one is made and kept")
    add("--threads", type=count, default=benchmark.usable_cores(), help="cores to use (all)")
    add("--no-torch", action="store_true", help="ours only")
    add("--lines", type=count, default=40, help="operators to print (40); the JSON has all")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add(
        "--timeout",
        type=benchmark.number(float, 0, None, True),
        default=3600,
        help="seconds for each library (3600)",
    )
    return parser


def measure(args) -> tuple[dict, dict | None]:
    """Our profile, with torch's milliseconds for each operator in it, and torch's own."""
    model, _ = benchmark.find_model(args)
    job = {name: getattr(args, name) for name in ("size", "batch", "evaluations", "threads")}
    job.update(model=str(model))
    with tempfile.TemporaryDirectory(prefix="mindiffedit-profile-") as cache:
        ours = benchmark.run_job({**job, "kind": "profile-ours"}, args.timeout, {"MINDIFFEDIT_CACHE": cache})
    if args.no_torch:
        return ours, None
    kernels = [{key: row[key] for key in ("kernel", "stride", "shapes")} for row in ours["rows"]]
    theirs = benchmark.run_job({**job, "kind": "profile-torch", "kernels": kernels}, args.timeout)
    for row, milliseconds in zip(ours["rows"], theirs.pop("alone")):
        row["torch_ms"] = milliseconds
    return ours, theirs


def main(arguments=None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.model and args.model != "demo" and not benchmark.checkpoint.is_checkpoint(args.model):
        parser.error(f"--model {args.model} is no folder with a model_index.json.")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"--json {args.json} cannot be written: it is a folder, or its folder is missing.")
    try:
        with benchmark.terminated_as_interrupted():
            ours, theirs = measure(args)
    except ValueError as error:
        parser.error(str(error))
    except benchmark.Died as death:
        benchmark.say(f"the measurement {death}")
        benchmark.say("\n".join(f"    {line}" for line in death.lines))
        return 1
    except KeyboardInterrupt:
        benchmark.say("interrupted")
        return 130
    results = {
        "settings": {name: getattr(args, name) for name in ("size", "batch", "evaluations", "threads")},
        "machine": benchmark.describe_machine(),
        "families": family_rows(ours["rows"], theirs["rows"] if theirs else []),
        "ours": ours,
        "torch": theirs,
    }
    print(tables(results, args.lines))
    if args.json:
        report.write_whole(args.json, (json.dumps(results, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
