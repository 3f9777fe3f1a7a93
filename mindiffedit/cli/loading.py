"""From a job to the loaded pipeline: its files are found, captions and prompts are written, the solver is chosen."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindiffedit import demo, solvers
from mindiffedit.checkpoints import hub, survey, textual_inversion
from mindiffedit.cli.checks import is_given
from mindiffedit.cli.job import Job, fit, read_pictures
from mindiffedit.cli.wording import about, note, option
from mindiffedit.errors import InputError, Message
from mindiffedit.runtime import devices, quick_imports
from mindiffedit.solvers import schedules


def load(job: Job):
    """Read the pictures, and load the pipeline on the device asked for. In here MindSpore is imported."""
    read_pictures(job)
    pipe = load_model(job)
    with hushed():
        choose_solver(job, pipe)
    if job.prompts is not None:
        from mindiffedit.text.prompts import average_embeddings

        with job.timed("prompts"):
            job.embeds = {which: average_embeddings(pipe, texts) for which, texts in job.prompts.items()}
    _note_idle_words(job, pipe)
    return pipe


def load_model(job: Job):
    """The pipeline with its adapters; pictures that were read are fitted to it as soon as it is known."""
    find_model(job)
    with job.timed("load"), hushed():
        quick_imports.import_beside()
        job.device = require_device(job.args.device)
    # These models first, so that they are gone when the large one comes.
    _write_caption(job)
    _write_prompts(job)
    with job.timed("load"), hushed():
        pipe = _load_pipeline(job)
        _load_adapters(job, pipe)
    if job.single_file is not None:
        _take_configs(job, {name: pipe.components[name].config for name in ("vae", "unet")})
    if not gc.isenabled():  # the program has switched it off until now
        gc.freeze()
        gc.enable()
    return pipe


@contextlib.contextmanager
def hushed():
    """Hold back what libraries print and deprecate while they are imported; it says nothing to our user."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def require_device(name: str | None) -> str:
    """The device of this name, or MindSpore's choice, made ready; an InputError where it is not here."""
    try:
        quick_imports.complete_for(name or devices.device_target())
        return devices.require_device(name)
    except RuntimeError as error:
        raise InputError(" ".join(str(error).split())) from error


# --- files -----------------------------------------------------------------------------------------


def find_model(job: Job) -> None:
    """Judge the files of models on this machine; a hub id is only looked at."""
    for path, _ in job.loras:
        _check_weights_file(path, "--lora")
    for path, _ in job.embeddings:
        _check_weights_file(path, "--embedding")
    _take_words(job)
    for name in ("config", "prompt_model", "caption_model"):
        if is_given(job.args, name):
            _is_folder(getattr(job.args, name), option(name))
    model = job.args.model
    if model == "demo":
        _take_folder(job, demo.checkpoint_folder())
    elif model.lower().endswith(".safetensors") and not os.path.isdir(model):
        _check_weights_file(model, "--model")
        job.single_file = Path(model)
    elif _is_folder(model, "--model"):
        _take_folder(job, Path(model))


def _take_words(job: Job) -> None:
    """The words of embeddings, each of another one."""
    files: dict[str, str] = {}
    for path, word in job.embeddings:
        word = textual_inversion.word_of(path) if word is None else word
        if word in files:
            raise InputError(
                f"--embedding {files[word]} and {path} have the same word {word!r}; give one another by FILE=WORD."
            )
        files[word] = path
    job.embeddings = [(path, word) for word, path in files.items()]


def _check_weights_file(path: str, parameter: str) -> None:
    if not path.lower().endswith(".safetensors"):
        raise InputError(
            "{parameter} {path}: only .safetensors files are read, since others can run code; {remedy}.",
            parameter,
            path=path,
            # As prompts of other programs have it.
            remedy="a weight or a word follows after '='" if ".safetensors:" in path.lower() else "convert it",
        )
    if not os.path.isfile(path):
        raise InputError("{parameter} {path}: there is no such file.", parameter, path=path)


def _is_folder(model: str, parameter: str) -> bool:
    """Whether the model is a folder on this machine, or else may be a hub id."""
    if os.path.isdir(model):
        return True
    if os.path.exists(model):
        raise InputError(
            "{parameter} {model} is a file; give a folder in its library's layout{also}.",
            parameter,
            model=model,
            also=" or a .safetensors file" if parameter == "--model" else "",
        )
    parts = model.split("/")
    if len(parts) != 2 or not all(parts) or model.startswith((".", "~")):
        raise InputError(
            "{parameter} {model}: there is no such folder, and a hub id is organisation/name.", parameter, model=model
        )
    return False


def _take_folder(job: Job, folder: Path) -> None:
    """Find an unusable folder before MindSpore is imported, and fit the pictures to what it says."""
    job.folder = folder
    _take_configs(job, survey.check_folder(folder, _skipped(job), getattr(job.args, "variant", None)))


def _take_configs(job: Job, configs: Mapping[str, Mapping[str, Any]]) -> None:
    job.configs = configs
    if hasattr(job, "picture"):  # the job of a model alone has none
        fit(job)


def _skipped(job: Job) -> tuple[str, ...]:
    """Components of the model that are not wanted."""
    return ("safety_checker",) if job.args.no_safety_checker else ()


# --- what is loaded --------------------------------------------------------------------------------


def _running(job: Job) -> dict[str, Any]:
    """How every model is run."""
    return dict(mode=job.args.mode, compile_cache=False if job.args.no_cache else None)


def _load_pipeline(job: Job):
    pipe = _read_pipeline(job)
    pipe.jit_level = job.args.jit_level
    return pipe


def _read_pipeline(job: Job):
    from mindiffedit.pipeline import StableDiffusionDiffEditPipeline

    args = job.args
    how = dict(_running(job), mindspore_dtype=args.dtype)
    if args.no_safety_checker:
        how.update(safety_checker=None, requires_safety_checker=False)
    if job.single_file is not None:
        return StableDiffusionDiffEditPipeline.from_single_file(
            str(job.single_file), config=args.config, local_files_only=args.offline or None, **how
        )
    fetch_model(job)
    return StableDiffusionDiffEditPipeline.from_pretrained(
        str(job.folder), local_files_only=True, **how, **_variant(job)
    )


def fetch_model(job: Job) -> None:
    """The folder of a model on the hub, fetched from there unless it is here; others were found."""
    if job.folder is None and job.single_file is None:
        options = hub.HubOptions(revision=job.args.revision, local_files_only=job.args.offline)
        _take_folder(job, hub.resolve_folder(job.args.model, options, skip=_skipped(job), **_variant(job)))


def _variant(job: Job) -> dict[str, str]:
    return {"variant": job.args.variant} if is_given(job.args, "variant") else {}


def choose_solver(job: Job, pipe) -> None:
    """The solver asked for, or the model's own where it can be inverted, or DDIM; with its inverse."""
    args, scheduler = job.args, pipe.scheduler
    wanted = args.scheduler or (job.recipe["scheduler"] if job.recipe is not None else None)
    name, why_not = solvers.solver_name(scheduler), schedules.why_not(scheduler.config) if job.inverts else ""
    if wanted == "dpm" and why_not:
        raise InputError(
            "--scheduler dpm: the model's {scheduler!t} cannot be inverted with {why_not}; give --scheduler ddim.",
            scheduler=scheduler,
            why_not=why_not,
        )
    if name == "dpm" and why_not:
        name = None
    job.scheduler = wanted or name or "ddim"
    if job.scheduler == "dpm" and job.inverts and job.settings["iterations"]:
        raise InputError(
            "--iterations refines DDIM's inversion, and the model's solver is {scheduler!t}; give --scheduler ddim.",
            scheduler=scheduler,
        )
    as_there = job.scheduler == name or args.reference and job.scheduler == "ddim"
    pipe.scheduler, pipe.inverse_scheduler = solvers.made(job.scheduler, scheduler.config, as_there)
    if wanted is None and name is None:
        spacing = "" if as_there else f", its timesteps spaced as {pipe.scheduler.config['timestep_spacing']!r}"
        note(
            Message(
                "the model's {scheduler!t} cannot be inverted{why}, so DDIM is taken{spacing}; --scheduler chooses.",
                scheduler=scheduler,
                why=f" with {why_not}" if why_not else "",
                spacing=spacing,
            )
        )


def _load_adapters(job: Job, pipe) -> None:
    for path, word in job.embeddings:
        pipe.load_textual_inversion(path, token=word)
    weights = {f"lora_{i}": weight for i, (_, weight) in enumerate(job.loras)}
    for name, (path, _) in zip(weights, job.loras):
        pipe.load_lora_weights(path, adapter_name=name)
    if weights:
        pipe.set_adapters([*weights], [*weights.values()])


def _note_idle_words(job: Job, pipe) -> None:
    """Say which embeddings are in no prompt, and which words of prompts look like ones that were to be loaded."""
    texts = [job.source, job.target, job.caption, getattr(job.args, "negative", None)]
    texts += sum((job.prompts or {}).values(), [])
    text = "\n".join(filter(None, texts))
    words = {word: path for path, word in job.embeddings if word is not None}
    used = textual_inversion.occurring([*words], text)
    for word, path in words.items():
        if word not in used:
            near = textual_inversion.occurring([word, Path(path).stem], text, re.IGNORECASE)
            advice = f"{near[0]!r} is, which has to be written {word!r}." if near else "write it there just so."
            note(f"the word {word!r} of --embedding {path} is in no prompt, so it changes nothing; {advice}")
    for word in sorted([*words, *pipe.tokenizer.added_tokens_encoder], key=len, reverse=True):
        text = text.replace(word, " ")
    for word in sorted(set(re.findall(r"<lora:[^<>\n]+>|<[^<>\s]+>", text))):
        what, name = ("LoRA", "--lora") if word.startswith("<lora:") else ("embedding", "--embedding")
        note(f"{word} in a prompt stands for no {what} that is loaded and is read as plain text; give {name} FILE.")


# --- models that write -----------------------------------------------------------------------------


def _write_caption(job: Job) -> None:
    """--caption-model: what the picture shows, for the inversion, and as the source where that is missing."""
    if not is_given(job.args, "caption_model"):
        return
    with job.timed("caption"), hushed():
        job.caption = load_captioner(job, job.args.caption_model).caption(job.original.shown)
    note(f"the picture's caption: {job.caption}")
    if job.source is None:
        job.source = job.caption


def load_captioner(job: Job, name: str):
    """The BLIP of a folder or hub id, run as the job says."""
    from mindiffedit.text.prompts import Captioner

    return Captioner.from_pretrained(name, local_files_only=job.args.offline or None, **_running(job))


def _write_prompts(job: Job) -> None:
    """--prompt-model: prompts about the source and about the target."""
    if not is_given(job.args, "prompt_model"):
        return
    concepts, job.prompts = {"source": job.source, "target": job.target}, {}
    with job.timed("prompts"), hushed():
        from mindiffedit.text.prompts import PromptGenerator

        writer = PromptGenerator.from_pretrained(
            job.args.prompt_model, local_files_only=job.args.offline or None, **_running(job)
        )
        for which, concept in concepts.items():
            with about(which, "text", "concept"):
                job.prompts[which] = writer.prompts_for(concept, generator=job.args.seed)
    for which, texts in job.prompts.items():
        note(f"{len(texts)} prompts about the {which} {concepts[which]!r}, such as {texts[0]!r}.")
