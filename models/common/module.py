"""A model as an NNX module, for those who want to hold parameters in an object."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from models.common.params import ParamSpec, check_params
from models.common.shapes import Key, Params


def as_module(tree: Params) -> nnx.Dict[Any]:
    """A tree of arrays as NNX parameters."""
    return nnx.Dict(
        {name: as_module(leaf) if isinstance(leaf, dict) else nnx.Param(leaf) for name, leaf in tree.items()}
    )


class ModelModule[Config, Runtime](nnx.Module):
    """What the modules of all models are: their parameters, one `nnx.Param` per canonical name.

    A model's class says how it is called, and names its table of parameters, its initialiser and the runtime
    that is used without one.
    """

    _specs: Callable[[Config], Mapping[str, ParamSpec]]
    _init: Callable[[Config, Key], Params]
    _runtime: Callable[[], Runtime]

    def __init__(
        self,
        config: Config,
        runtime: Runtime | None = None,
        *,
        rngs: nnx.Rngs | None = None,
        params: Params | None = None,
    ):
        """Makes a model with fresh parameters from `rngs`, or around existing ones.

        Args:
          config, runtime: what the model is, and how it is run.
          rngs: source of the initial parameters (stream "params").
          params: canonical tree, for instance from `convert.load_official`.

        Raises:
          ValueError: neither or both of rngs and params, or params of another config.
        """
        if (rngs is None) == (params is None):
            name = type(self).__name__
            raise ValueError(
                f"{name} needs exactly one of rngs (fresh parameters) and params (existing ones)"
            )
        if params is None:
            assert rngs is not None
            params = self._init(config, rngs.params())
        check_params(self._specs(config), params, config)
        self.config = config
        self.runtime = runtime or self._runtime()
        for name, group in params.items():
            setattr(self, name, as_module(group))

    def params(self) -> Params:
        """The parameters as a pure dict by canonical names."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))
