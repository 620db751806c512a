"""How the repository's own checkpoint was made: vocabulary, cached tokens, masked-language-model training."""
