"""Online backfilling's models: backbones of two versions, and the transforms between their embeddings.

An embedding is float32 [N, D] with rows of length 1; a distance is the squared Euclidean one, 2 − 2⟨a, b⟩. The method
page is docs/backfilling_methods.md.
"""
