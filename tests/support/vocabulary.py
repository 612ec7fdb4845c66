"""What the tokens of a tokenizer stand for."""

from paravt_jax.structure import token_bytes


def contents_of(tokenizer):
    """Bytes of each id; three ids more than the tokenizer has, as in a padded embedding."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    return token_bytes(tokenizer.get_vocab(), added, size=tokenizer.get_vocab_size() + 3)
