"""From files of any common format to token ids with a mask of what is trained on."""
