"""What a trained policy looks like on disk: a PEFT adapter, the exit heads beside it, the optimizer's moments.

    adapter_model.safetensors, adapter_config.json      LoRA, as PEFT writes and reads it
    exit_heads.safetensors, exit_config.json            the heads, the depths they stand at, a mark of the base
    optimizer.safetensors, state.json                   AdamW's moments and the step, to go on from
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.hub import UserError, field, fsync, read_json, write_json
from data.weights import refuse_difference, refuse_nan, shapes_in
from exits import PROJECTIONS, ExitHeads, Policy, projections, refuse_exits
from model import Transformer


def save_policy(policy: Policy, folder: Path) -> None:
    """Writes adapters and exit heads into a folder. Base weights are not written."""
    model = policy.model
    write_tensors(adapter_tensors(policy), folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name,
        "revision": model.revision, "r": policy.rank, "lora_alpha": policy.alpha, "lora_dropout": 0.0,
        "target_modules": list(PROJECTIONS), "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "inference_mode": True})
    write_tensors(dict(policy.heads.named_parameters()), folder / "exit_heads.safetensors")
    write_json(folder / "exit_config.json", {"exits": policy.exits, "head_width": policy.heads.hidden,
                                             "num_hidden_layers": policy.n_layers, "base": fingerprint(model)})


def load_policy(model: Transformer, folder: str | Path) -> Policy:
    """The policy that save_policy wrote, on `model`; of a run's folder, its newest checkpoint. Raises UserError unless
    every name and shape fits, before anything is allocated, and the base is the one it was trained on."""
    folder = checkpoint(folder)
    where, exits = folder / "exit_config.json", exits_of(folder)
    config, lora_where = read_json(where), folder / "adapter_config.json"
    layers, base = field(config, "num_hidden_layers", int, where, 1), field(config, "base", str, where, default=None)
    if layers != model.config.num_hidden_layers:
        raise UserError(f"{folder}: trained on a model of {layers} layers, but --model {model.name} has "
                        f"{model.config.num_hidden_layers}")
    if base not in (None, fingerprint(model)):
        raise UserError(f"{folder}: trained on another base model than --model {model.name}, whose weights differ")
    lora = read_json(lora_where)
    rank = field(lora, "r", int, lora_where, 1, 2**20)
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if field(lora, name, bool, lora_where, default=False):
            raise UserError(f"{lora_where}: {name} is not implemented")
    adapter = folder / "adapter_model.safetensors"
    refuse_difference(shapes_in(adapter), adapter_shapes(model, rank), adapter)
    refuse_exits(exits, layers)
    head_width, heads = field(config, "head_width", int, where, 0, 2**16, default=0), folder / "exit_heads.safetensors"
    wanted = ExitHeads(len(exits), model.config.hidden_size, head_width, model.config.rms_norm_eps, "meta")
    refuse_difference(shapes_in(heads), {name: tuple(p.shape) for name, p in wanted.named_parameters()}, heads)
    policy = Policy(model, exits, rank, field(lora, "lora_alpha", float, lora_where, 1e-6, 1e6), head_width)
    fill(adapter_tensors(policy), adapter)
    fill(dict(policy.heads.named_parameters()), heads)
    return policy


def adapter_tensors(policy: Policy) -> dict[str, torch.Tensor]:
    """The adapters under the names that PEFT gives them."""
    return {f"base_model.model.{name}.weight": p for name, p in policy.model.named_parameters() if "lora_" in name}


def adapter_shapes(model: Transformer, rank: int) -> dict[str, tuple[int, int]]:
    shapes = {}
    for name, module in projections(model).items():
        out_features, in_features = module.weight.shape
        shapes |= {f"base_model.model.{name}.lora_A.weight": (rank, in_features),
                   f"base_model.model.{name}.lora_B.weight": (out_features, rank)}
    return shapes


def exits_of(folder: Path) -> list[int]:
    where = folder / "exit_config.json"
    return field(read_json(where), "exits", list, where, 1, 2**9)


@torch.no_grad()
def fingerprint(model: Transformer) -> str:
    """Tells base models apart, wherever they lie: a hash of 64 values of every parameter, in bfloat16, since the same
    weights may be loaded in either dtype. Once the weights are shared out, what it was before."""
    if model.fingerprint is not None:
        return model.fingerprint
    values = [p.flatten()[:: max(1, p.numel() // 64)][:64] for name, p in model.named_parameters()
              if "lora_" not in name]
    bits = torch.cat([x.bfloat16() for x in values]).view(torch.int16).cpu().numpy().tobytes()
    return hashlib.sha256(bits).hexdigest()[:16]


def digest(folder: Path) -> str:
    """Tells a checkpoint from another of the same name."""
    files = (folder / name for name in ("adapter_model.safetensors", "exit_heads.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, the oldest first."""
    return sorted(run.glob("step-" + "[0-9]" * 6))


def refuse_absent(run: Path) -> None:
    """Raises UserError where a run's folder is not there."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the folder of a run of distill.py or rloo.py")


def checkpoint(run: str | Path) -> Path:
    """A run's newest checkpoint; where it is itself one, RUN/step-000120, that."""
    run = Path(run)
    if (run / "exit_config.json").exists():
        return run
    refuse_absent(run)
    found = checkpoints(run)
    if not found:
        raise UserError(f"{run}: no checkpoint in it yet; give a run of distill.py or rloo.py that has one, or go on "
                        f"with this one (--resume {run})")
    return found[-1]


@torch.no_grad()
def merge(policy: Policy) -> None:
    """Adds the adapters' product to the base weights and switches the adapters off."""
    for a in policy.adapters:
        a.weight += (a.scale * (a.lora_B @ a.lora_A)).to(a.weight.dtype)
        a.on = False


def moments(policy: Policy, optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, p in policy.trained().items()
            for key, value in optimizer.state[p].items()}


def write_tensors(tensors: dict[str, torch.Tensor], path: Path, **about: str) -> None:
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path,
                  metadata={"format": "pt", **about})
    except SafetensorError as error:  # a full disk, for one
        raise UserError(f"{path} can't be written ({error})") from None
    fsync(path)


@torch.no_grad()
def fill(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies a safetensors file into tensors of the same names and shapes. Raises UserError naming what differs."""
    refuse_difference(shapes_in(path), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)
    with safe_open(path, framework="pt") as file:
        for name, tensor in tensors.items():
            tensor.copy_(refuse_nan(file.get_tensor(name), name, path))
