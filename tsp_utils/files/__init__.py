"""Files: where they lie and how they are written; images in folders and in published form."""
