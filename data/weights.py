"""A checkpoint of the hub: what its config.json says, and its safetensors into a model. What differs is refused."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from data.hub import UserError, field, read_json

DTYPES = ("F64", "F32", "F16", "BF16")  # others are quantised: numbers that mean nothing without their scales


def config_fields(cfg: dict, where: str = "config.json") -> dict:
    """Reads either generation of config (`rope_theta`/`rope_scaling`, or `rope_parameters`).

    Raises UserError naming the field for anything that this model would compute differently.
    """

    def refuse(name, why):
        raise UserError(f"{where}: {name} = {cfg.get(name)!r:.60}: {why}")

    kind = field(cfg, "model_type", str, where)
    if kind not in ("qwen2", "qwen3", "llama"):
        refuse("model_type", "only dense 'qwen2', 'qwen3' and 'llama' checkpoints are implemented")
    for name in ("num_experts", "num_local_experts", "quantization_config"):
        if cfg.get(name):
            refuse(name, "mixture-of-experts and quantised weights are not implemented; use a dense checkpoint")
    if cfg.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only 'silu' is implemented")
    if cfg.get("use_sliding_window") or "sliding_attention" in str(cfg.get("layer_types")):
        refuse("layer_types" if cfg.get("layer_types") else "use_sliding_window",
               "sliding-window attention is not implemented")
    rope = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope) if isinstance(rope, dict) else rope  # transformers 5 may nest it by type
    scaled = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
    if scaled != "default":
        why = ("and this model (Llama 3.1 or later) was trained with it; take another" if scaled == "llama3" else
               "remove it to run at the original context length")
        refuse("rope_parameters" if cfg.get("rope_parameters") else "rope_scaling",
               f"RoPE scaling is not implemented; {why}")

    def size(name, default=..., high=2**20):
        return field(cfg, name, int, where, 1, high, default)

    def flag(name):
        return field(cfg, name, bool, where, default=False)

    heads, width = size("num_attention_heads", high=2**12), size("hidden_size")
    groups, head_dim = size("num_key_value_heads", heads, 2**12), size("head_dim", width // heads)
    if heads % groups:
        refuse("num_key_value_heads", "must divide the number of heads")
    if head_dim % 2:
        refuse("head_dim", "must be even")
    return dict(
        model_type=kind,
        vocab_size=size("vocab_size", high=2**24),
        hidden_size=width,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers", high=2**9),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,  # Qwen2 and Llama have no such field; Qwen3's is explicit, and H C need not equal D
        rms_norm_eps=field(cfg, "rms_norm_eps", float, where, 0, 1, 1e-6),
        rope_theta=field(cfg if rope.get("rope_theta") is None else rope, "rope_theta", float, where, 1, 1e12, 1e4),
        tie_word_embeddings=flag("tie_word_embeddings"),
        # Qwen2 always has biases on q, k and v and no field that says so.
        attention_bias=True if kind == "qwen2" else flag("attention_bias"),
        max_position_embeddings=size("max_position_embeddings", 32_768, 2**31),
    )


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; every shard that the index names must be there. Where there is a
    model.safetensors, too, it counts, as in transformers: an index beside it is left from before."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        shards = field(read_json(index), "weight_map", dict, index)
        names = sorted({field(shards, tensor, str, index) for tensor in shards})
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{index}: shard name {outside[0]!r} points outside the folder")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent or not names:
        raise UserError(f"{folder}: weight file(s) {', '.join(absent)} missing; download the checkpoint again, or take "
                        f"one that has safetensors files")
    return [folder / name for name in names]


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, from its header. Raises UserError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            # Old Llama checkpoints also hold the rotary frequencies, which follow from the config.
            parts = {name: file.get_slice(name) for name in file.keys() if not name.endswith("rotary_emb.inv_freq")}
            for name, part in parts.items():
                if part.get_dtype() not in DTYPES:
                    raise UserError(f"{path}: {name} is of type {part.get_dtype()}: only {', '.join(DTYPES)} are read")
            return {name: tuple(part.get_shape()) for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, damaged or truncated ({error})") from None


def refuse_difference(found: dict[str, tuple], wanted: dict[str, tuple], where) -> None:
    """Raises UserError naming every tensor that is missing, unexpected or of another shape."""
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"{name} has shape {found[name]}, not {wanted[name]}" for name in sorted(found.keys() & wanted.keys())
                 if found[name] != wanted[name]]
    if problems:
        raise UserError(f"{where} does not fit the model: " + "; ".join(problems))


def refuse_nan(tensor: torch.Tensor, name: str, where) -> torch.Tensor:
    if not all(bool(torch.isfinite(x)) for x in torch.aminmax(tensor)):  # NaN comes through, and no mask is built
        raise UserError(f"{where}: {name} holds NaN or infinite values: training went wrong, or the file is damaged")
    return tensor


def load_weights(model: nn.Module, folder: Path, dtype: torch.dtype, device) -> None:
    """Fills a model built on the meta device. All names and shapes are compared before the first tensor is read."""
    wanted = dict(model.named_parameters())  # a tied head is the embedding's parameter and is not listed twice
    shapes = {path: shapes_in(path) for path in shard_paths(folder)}
    found = {name: shape for inside in shapes.values() for name, shape in inside.items()}
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the tied copy too
    refuse_difference(found, {name: tuple(p.shape) for name, p in wanted.items()}, folder)

    for path, inside in shapes.items():
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in inside.keys() & found.keys():
                module = model.get_submodule(name.rpartition(".")[0])
                tensor = refuse_nan(file.get_tensor(name), name, path).to(dtype)
                setattr(module, name.rpartition(".")[2], nn.Parameter(tensor))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
