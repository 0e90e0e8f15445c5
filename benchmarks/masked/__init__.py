"""Parts of the masked family's benchmark."""
