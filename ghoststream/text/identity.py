"""What of a text can be told from its specifications alone."""

from __future__ import annotations

from ghoststream.options import Text
from ghoststream.recipe import TextRecipe
from ghoststream.text.spec import TextSpec
from ghoststream.text.token_set import TokenSet


def without_folders(text: Text) -> str | list[str]:
    """Return the specification of a text, or those of several, without the folders that files are in."""
    specs = [TextSpec.parse(spec).identity for spec in text.specs]
    return specs[0] if len(specs) == 1 else specs


def recipe_of(text: Text, tokens: TokenSet) -> TextRecipe:
    """Return a text as recipes name it: without folders, whose place the digest of the tokens takes."""
    return TextRecipe(**{**dict(text), "spec": without_folders(text)}, first_tokens=tokens.first_tokens)


def is_ids(text: Text) -> bool:
    """Whether a text, or each of several, is given as token ids, so that no tokenizer is needed."""
    return all(TextSpec.parse(spec).kind == "ids" for spec in text.specs)
