"""Text on disk to batches of tokens: corpora, tokenizers, Megatron's .bin/.idx files, sample orders, validation sets.

Enter through `megalite.data.bundle.prepare_data`. Nothing here knows of models, meshes or communication.
"""
