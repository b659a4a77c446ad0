"""A checkpoint folder in Hugging Face's format, all but its tensors: config, stop ids, file names.

Where two keys disagree, the one counts that counts in transformers.
"""
from pathlib import Path

from data import InputError, read_json

# If config.json has one of these keys, its value must be this one. There is no code for others.
SUPPORTED = {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}


def read_config(folder: Path, types: dict[str, type]) -> dict:
    """The keys of config.json that `types` names, each of this type and above 0. InputError names
    a missing key, a bad value or a feature that model.py does not have.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    for key, want in SUPPORTED.items():
        if raw.get(key, want) != want:
            raise InputError(f"{path}: {key} is {raw[key]!r}, only {want!r} is supported")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise InputError(f"{path}: layer_types should all be full_attention")
    raw |= _rope(path, raw)
    for name, kind in types.items():
        value = raw.get(name)
        # The exact type, because True is an int. An int may stand for a float.
        typed = type(value) is kind or (kind is float and type(value) is int)
        if not typed or (kind is not bool and not 0 < value < 1e12):
            want = {bool: "true or false", int: "a whole number above 0"}
            expected = want.get(kind, "a number above 0")
            raise InputError(f"{path}: {name} should be {expected}, found {value!r}")
    D = raw["hidden_size"]
    H = raw["num_attention_heads"]
    K = raw["num_key_value_heads"]
    if D % (2 * H) or H % K or raw["num_hidden_layers"] > 1000:
        raise InputError(f"{path}: hidden_size {D} should be a multiple of 2 x "
                         f"num_attention_heads {H}, which should be a multiple of "
                         f"num_key_value_heads {K}; and at most 1000 layers are possible")
    return {name: raw[name] for name in types}


def _rope(path: Path, raw: dict) -> dict:
    """The settings of the rotary angles in their own object. They precede those beside it."""
    for name in ("rope_scaling", "rope_parameters"):  # older files have the first name
        rope = raw.get(name) or {}
        if not isinstance(rope, dict):
            raise InputError(f"{path}: {name} should be an object, found {rope!r}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(f"{path}: {name} has rope_type {kind!r}, only 'default' is "
                             "supported")
        if rope:
            return {"rope_theta": rope.get("rope_theta", raw.get("rope_theta"))}
    return {}


def stop_ids(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, or of config.json if that has none."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        stops = read_json(path).get("eos_token_id") if path.exists() else None
        if stops is None:
            continue
        stops = stops if isinstance(stops, list) else [stops]
        for stop in stops:
            if type(stop) is not int:
                raise InputError(f"{path}: eos_token_id should hold ids, found {stop!r}")
        return stops
    return []


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or model.safetensors. Other files are never opened."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: no 'weight_map' from tensors to files")
    return [folder / file for file in sorted(set(weight_map.values()))]
