"""Shows the attention mask of a Row, as text or as a picture.

Trees by their lengths, ``PREFIX:BRANCH,BRANCH,...``::

    python -m prefix_sharing.reports.mask 6:4,3 5:2,3,2

Examples of a config's data set, as a picture::

    python -m prefix_sharing.reports.mask --config quickstart/single_device --examples 0 1 --png mask.png
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from prefix_sharing.errors import UserError
from prefix_sharing.trees import Response, Row, RowOptions

_CELLS = 72
"""Width of the text in characters; longer Rows have several tokens per character."""


def visible(row: Row) -> np.ndarray:
    """The mask of a Row.

    Args:
        row (Row): what is drawn.

    Returns:
        np.ndarray: True where the token of the first index may see that of the second, shape ``[s, s]``.
    """
    i, j = np.indices((row.tokens.shape[1],) * 2)
    return (j <= i) & (i < row.subtree_end.cpu().numpy()[None, :])


def mask_as_text(row: Row) -> str:
    """Draws the mask with characters: ``█`` seen, ``▒`` seen in part, ``·`` not seen.

    Args:
        row (Row): what is drawn.

    Returns:
        str: a line for every token or group of tokens.
    """
    mask = visible(row)
    step = -(-len(mask) // _CELLS)
    starts = range(0, len(mask), step)
    shares = [[mask[i : i + step, j : j + step].mean() for j in starts] for i in starts]
    lines = [
        "".join("·" if share == 0 else "█" if share == 1 else "▒" for share in shares_of_i) for shares_of_i in shares
    ]
    unit = "one token" if step == 1 else f"{step} tokens"
    saved = 1 - row.num_tokens / max(row.paired_tokens, 1)
    lines.append(
        f"{row.num_tokens} tokens, {unit} per character; {row.paired_tokens} without sharing, {saved:.0%} saved"
    )
    return "\n".join(lines)


def save_mask_as_png(row: Row, file: str) -> None:
    """Draws the mask as a picture.

    Args:
        row (Row): what is drawn.
        file (str): where to write it.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    mask = visible(row)
    # Keys of ancestors (the shared prefix) in another shade than a branch's own.
    shades = mask.astype(int)
    for chain in row.chains:
        for start, end in chain.ancestors:
            shades[slice(*chain.span), start:end] *= 2
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shades, cmap=ListedColormap(["white", "#3b6ea5", "#e0a030"]), vmin=0, vmax=2, interpolation="nearest")
    axes.set_xlabel("token that is seen")
    axes.set_ylabel("token that sees")
    axes.set_title(f"{row.num_tokens} tokens; {row.paired_tokens} without sharing\n(yellow: a prefix computed once)")
    figure.savefig(file, dpi=120)


def tree_of_lengths(lengths: str) -> list[Response]:
    """An example made up from ``PREFIX:BRANCH,BRANCH,...``.

    Args:
        lengths (str): such as ``6:4,3``.

    Returns:
        list[Response]: responses that share a prefix of that length, each followed by its own tokens.

    Raises:
        UserError: if the text has another form.
    """
    try:
        prefix, branches = lengths.split(":")
        sizes = [int(prefix), *map(int, branches.split(","))]
    except ValueError as error:
        raise UserError(f"'{lengths}' is not of the form PREFIX:BRANCH,BRANCH, such as 6:4,3.") from error
    responses = []
    for branch, size in enumerate(sizes[1:], start=1):
        # One more than asked for: the last token of a response is predicted, but need not be read.
        tokens = np.array([0] * sizes[0] + [branch] * (size + 1))
        responses.append(Response(tokens, np.arange(len(tokens)) >= sizes[0]))
    return responses


def examples_of_config(name: str, indices: Sequence[int]) -> list[list[Response]]:
    """Examples of the training data set that a config names.

    Args:
        name (str): name or path of the config.
        indices (Sequence[int]): which examples.

    Returns:
        list[list[Response]]: their responses.
    """
    from omegaconf import OmegaConf

    from prefix_sharing.config import find_config, instantiate

    cfg = OmegaConf.load(find_config(name))
    cfg.dataset.pop("packed", None)
    dataset = instantiate("dataset", cfg.dataset, instantiate("tokenizer", cfg.tokenizer))
    return [dataset[i] for i in indices]


def main() -> None:
    """Reads the command line and shows the mask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="PREFIX:BRANCH,BRANCH", help="trees of the Row, by their lengths")
    parser.add_argument("--config", metavar="NAME", help="take examples of this config's data set")
    parser.add_argument("--examples", type=int, nargs="+", default=[0], metavar="I", help="which examples (default: 0)")
    parser.add_argument("--paired", action="store_true", help="compute every response on its own")
    parser.add_argument("--png", metavar="FILE", help="write a picture instead of text")
    options = parser.parse_args()
    if bool(options.trees) == bool(options.config):
        parser.error("give either trees or --config")
    try:
        if options.config:
            examples = examples_of_config(options.config, options.examples)
        else:
            examples = [tree_of_lengths(lengths) for lengths in options.trees]
        row = Row.from_examples(examples, options=RowOptions(share_prefix=not options.paired))
        if options.png:
            save_mask_as_png(row, options.png)
        else:
            print(mask_as_text(row))
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
