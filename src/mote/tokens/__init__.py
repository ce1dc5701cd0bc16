"""Chains to token ids, step ids, attention masks and packed batches."""
