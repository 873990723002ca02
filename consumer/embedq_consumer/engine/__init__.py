"""The engine: model directories in, vectors out. The only package that imports torch and transformers."""
