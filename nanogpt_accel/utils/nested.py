"""Split nested Python values, such as the state of an optimizer, into JSON and tensors, and put them together again."""

_SEQUENCES = {"list": list, "tuple": tuple, "set": set}


def pack(value, name, tensors):
    """Convert `value` to JSON values. Replace each tensor by a name, and add {name: tensor} to the dict `tensors`.

    value: None, a number, a text, a tensor, or a list, tuple, set or dictionary of such values. name: name of `value`.
    The names of the tensors start with this name.

    Raises:
        TypeError: a value of another type.
    """
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return ["tensor", name]
    if isinstance(value, tuple(_SEQUENCES.values())):
        kind = next(kind for kind, of_kind in _SEQUENCES.items() if isinstance(value, of_kind))
        return [kind, [pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]]
    if isinstance(value, dict):
        # a list of pairs, because JSON would turn keys that are numbers into strings
        return ["dict", [[key, pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]]
    raise TypeError(f"{name} is a {type(value).__name__}, which checkpoints cannot store")


def unpack(plain, tensors):
    """Return the original value. plain: the result of `pack`. tensors: function that returns the tensor of a name."""
    if not isinstance(plain, list):
        return plain
    kind, items = plain
    if kind == "tensor":
        return tensors(items)
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in items}
    return _SEQUENCES[kind](unpack(item, tensors) for item in items)
