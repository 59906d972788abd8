"""What recurrent layers hold at work in transformers' PyTorch code, which a plain layer does not."""

from __future__ import annotations

from typing import Any

from ghoststream.checkpoint.configuration import plain_type

# transformers' delta rule goes over chunks of so many tokens.
_DELTA_CHUNK = 64


def scan_bytes_per_token(config: Any) -> int:
    """Return the bytes that the scan of a recurrent layer holds a token, beyond a plain layer's work.

    Scans are computed in float32. How many tensors of each shape are alive together was counted and compared
    with the peak of one layer: what a layer counts is then 1.0 to 1.3 times its peak.

    Args:
        config: A transformers configuration, of a recovered model too.

    Returns:
        0 where scans hold no more than other layers do.
    """

    def setting(name: str, usual: int) -> int:
        return int(getattr(config, name, None) or usual)

    model_type, hidden = plain_type(config), setting("hidden_size", 4096)
    if model_type == "jamba":
        return 4 * 4 * setting("mamba_expand", 2) * hidden * setting("mamba_d_state", 16)
    if model_type == "kimi_linear":
        return 4 * 3 * setting("linear_num_heads", 32) * _DELTA_CHUNK * setting("linear_head_dim", 128)
    if model_type in _MAMBA2:
        heads, chunk, state = (setting(name, usual) for name, usual in _MAMBA2[model_type])
        return 4 * heads * (5 * chunk + 3 * state)
    return 0


_BAMBA = (("mamba_n_heads", 128), ("mamba_chunk_size", 256), ("mamba_d_state", 256))
# Heads, tokens of a chunk and size of a head's state, by their names.
_MAMBA2 = {
    "bamba": _BAMBA,
    "falcon_h1": _BAMBA,
    "granitemoehybrid": _BAMBA,
    "mamba2": (("num_heads", 128), ("chunk_size", 256), ("state_size", 128)),
    "nemotron_h": (("mamba_num_heads", 128), ("chunk_size", 128), ("ssm_state_size", 128)),
}
