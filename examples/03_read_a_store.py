"""Read hidden states from a store, block by block, and print how large they are in each layer: STORE.

The first token of a text often has a hidden state far larger than all others (an attention sink); it shows
here.
"""

from __future__ import annotations

import sys

import numpy as np

import ghoststream


def main(uri: str) -> None:
    store = ghoststream.ActivationStore.open(uri)
    print(f"{store.n_sequences} sequences of {store.length} tokens, {store.hidden} channels, {store.dtype}")
    print("layer  first token  other tokens  (mean norm)")
    for layer in store.completed_layers():
        first, rest = [], []
        for start in range(0, store.n_sequences, 8):
            stop = min(start + 8, store.n_sequences)
            norms = np.linalg.norm(store.read_numpy(layer, start, stop), axis=-1)
            mask = store.mask(start, stop)
            first.append(norms[:, :1][mask[:, :1]])
            rest.append(norms[:, 1:][mask[:, 1:]])
        print(f"h[{layer}]  {np.concatenate(first).mean():11.4g}  {np.concatenate(rest).mean():12.4g}")


if __name__ == "__main__":
    main(sys.argv[1])
