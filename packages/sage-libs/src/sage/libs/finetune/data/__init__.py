"""Read datasets in any common format, and convert them to token ids and labels."""
