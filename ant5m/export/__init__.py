"""A trained model in the formats of other programs. Nothing here needs any of them."""
