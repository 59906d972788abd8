"""How an architecture is described: the paths of its decoder, and what is where inside a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Module paths inside one decoder layer; the defaults are Llama's.

    Attributes:
        attention: The attention module, or the recurrent one in its place.
        attention_projection: Its last linear map (``o_proj``).
        mlp: The MLP, or the block of experts; where a layer has no module for it, its first linear map.
        mlp_projection: The MLP's last linear map (``down_proj``); layers with experts have none.
        attention_post_norm: Norm between attention and the residual stream, where there is one.
        mlp_post_norm: Norm between the MLP and the residual stream, where there is one.
        multiplier: Attribute of the layer that both are multiplied with on their way to the residual stream.
        mlp_multiplier: Path of an attribute that only the MLP's output is multiplied with.
        needs: Modules by which a layer of this kind is told from those of the kinds that follow.
        no_attention: Why there is no one module for attention; empty where there is.
        no_mlp: Why there is no one module for the MLP; empty where there is.
    """

    attention: str = "self_attn"
    attention_projection: str = "self_attn.o_proj"
    mlp: str = "mlp"
    mlp_projection: str = "mlp.down_proj"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    multiplier: str | None = None
    mlp_multiplier: str | None = None
    needs: tuple[str, ...] = ()
    no_attention: str = ""
    no_mlp: str = ""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Module paths of one architecture inside its ``...ForCausalLM`` class.

    ``decoder`` is the module that owns the layers and calls them; ``layers`` and ``final_norm`` are its
    children. ``layers_return_tuples`` says that the decoder takes the first item of what a layer returns;
    ``kinds`` says what is where inside a layer, for each kind of layer. ``embedding`` and ``head`` are the
    last parts of the names that the token embedding and the output head have in checkpoints. ``eager`` says
    that transformers computes attention eagerly by default, ``norm_names_epsilon`` that the final norm has
    its epsilon as an attribute.
    """

    decoder: str
    layers: str = "layers"
    final_norm: str = "norm"
    embedding: str = "embed_tokens"
    head: str = "lm_head"
    eager: bool = False
    layers_return_tuples: bool = False
    norm_names_epsilon: bool = True
    kinds: tuple[LayerParts, ...] = (LayerParts(),)

    def parts(self, has: Callable[[str], bool]) -> LayerParts:
        """Return what is where in a layer, told by which modules it has: the first kind that fits."""
        *others, last = self.kinds
        return next((kind for kind in others if all(map(has, kind.needs))), last)

    @property
    def layers_path(self) -> str:
        """Dotted path of the decoder layers' ``ModuleList``."""
        return f"{self.decoder}.{self.layers}"

    @property
    def final_norm_path(self) -> str:
        """Dotted path of the norm after the last layer."""
        return f"{self.decoder}.{self.final_norm}"
