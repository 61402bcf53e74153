"""Corpus preparation; the prepared texts are written into this folder, where git ignores them."""

# Which text is which, whatever its file is called: the sha256 of the prepared texts.
SHA256 = {
    "shakespeare": "1d9de98ac684c5e876d1c6bac847d77d16cb69ce14cb4f4473ac8f30964f9016",
    "tinyshakespeare": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}
