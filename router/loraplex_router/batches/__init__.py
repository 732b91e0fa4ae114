"""Batch jobs: files of requests that are answered in the background, durably, in a folder."""
