"""Read datasets in any common format, and convert the samples to token ids and labels."""
