"""Parts of the ptq4 family's benchmark."""
