"""Every public name of mlx.nn and mlx.optimizers is here with the same arguments, or in a table with the reason."""
import inspect

import mlx.nn
import mlx.optimizers
import mlx.utils
import pytest

from lazulite.engine import nn, optimizers

DISTRIBUTED = "training over several machines is out of scope"
MISSING = {
    **dict.fromkeys([
        "AllToShardedLinear", "ShardedToAllLinear", "QuantizedAllToShardedLinear", "QuantizedShardedToAllLinear",
        "FullyShardedModule", "fully_shard", "average_gradients"], DISTRIBUTED),
    "QQLinear": "there is no matmul of quantized activations with MLX's nvfp4 and mxfp8 inputs",
}
ARGUMENTS = {  # of these, arguments that are not here
    "quantize": {"quantize_input": "QQLinear is missing"},
}
PARTS = {
    "nn": (nn, mlx.nn), "losses": (nn.losses, mlx.nn.losses), "init": (nn.init, mlx.nn.init),
    "optimizers": (optimizers, mlx.optimizers), "utils": (nn, mlx.utils),
}
NOT_API = {"Any", "Callable", "Dict", "List", "Literal", "Optional", "Tuple", "Union", "Module", "Reduction",
           "defaultdict", "get_args", "partial", "reduce", "wraps", "zip_longest"}
NAMES = [(part, name) for part, (_, theirs) in PARTS.items() for name, value in vars(theirs).items()
         if callable(value) and not name.startswith("_") and ((part, name) == ("nn", "Module") or name not in NOT_API)
         and (part == "utils" or name not in vars(mlx.utils))]


def arguments(value) -> dict:
    parameters = inspect.signature(value).parameters.values()
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


@pytest.mark.parametrize(("part", "name"), NAMES)
def test_name(part: str, name: str) -> None:
    ours, theirs = PARTS[part]
    if name in MISSING:
        assert not hasattr(ours, name)
        return
    found, wanted = getattr(ours, name), getattr(theirs, name)
    if isinstance(wanted, type) and issubclass(wanted, mlx.nn.Module):
        methods = {m for m in vars(wanted) if not m.startswith("_")}
        assert not methods - set(dir(found)), f"{name} lacks methods"
    if "args" not in inspect.signature(found).parameters:
        lacking = set(arguments(wanted)) - set(arguments(found)) - set(ARGUMENTS.get(name, {}))
        assert not lacking, f"{name} lacks arguments"
        shared = [a for a in arguments(found) if a in arguments(wanted)]
        assert shared == [a for a in arguments(wanted) if a in shared]
        for a in shared:
            default = arguments(wanted)[a]
            if isinstance(default, int | float | str | list | tuple | None):
                assert arguments(found)[a] == (tuple(default) if isinstance(default, list) else default), f"{name}({a})"


def test_the_tables_are_of_use() -> None:
    assert len(NAMES) > 150 and set(MISSING) <= {name for _, name in NAMES}
