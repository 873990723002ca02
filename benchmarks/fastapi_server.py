"""sentence-transformers behind FastAPI, as people write it: one of the servers that `benchmarks.gateway` measures.

It runs in an environment of its own, which has both: MODEL=… uvicorn benchmarks.fastapi_server:app
"""

import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(os.environ["MODEL"], device="cpu")


class EmbeddingsRequest(BaseModel):
    input: str | list[str]
    model: str


@app.post("/v1/embeddings")  # type: ignore[untyped-decorator]
def embeddings(request: EmbeddingsRequest) -> dict[str, Any]:
    texts = [request.input] if isinstance(request.input, str) else request.input
    vectors = model.encode(texts, normalize_embeddings=True)
    data = [
        {"object": "embedding", "index": index, "embedding": vector.tolist()}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": request.model}
