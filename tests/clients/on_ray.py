"""What Ray's users write, as a program of its own: a client that its functions captured, and one that an actor makes.

Arguments: Kafka's address, the topics' prefix, seconds for a call, texts. Prints the vectors of both ways in JSON. Ends with code 3
where Ray itself does not start, for which it gives itself 30 s.
"""

import json
import sys

import numpy as np
import ray
import ray.data

from embedq_sdk.blocking import EmbedClient

NOT_STARTED = 3


def main(servers: str, prefix: str, seconds: str, *texts: str) -> None:
    timeout = float(seconds)
    client = EmbedClient(servers, topic_prefix=prefix, connect_timeout=timeout)

    @ray.remote  # type: ignore[untyped-decorator]
    def embed(text: str) -> np.ndarray:
        return client.embed(text, timeout=timeout)

    class Embed:
        def __init__(self) -> None:
            self.client = EmbedClient(servers, topic_prefix=prefix, connect_timeout=timeout)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = self.client.embed_many(batch["text"], timeout=timeout)
            return {"number": batch["number"], "vector": np.asarray(found)}

    try:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    except Exception as error:  # noqa: BLE001  # Ray raises nothing narrower
        sys.stderr.write(f"{error}\n")
        sys.exit(NOT_STARTED)
    tasks = ray.get([embed.remote(text) for text in texts])
    table = ray.data.from_items([{"number": n, "text": text} for n, text in enumerate(texts)])
    rows = table.map_batches(Embed, concurrency=1, batch_size=2).take_all()
    rows.sort(key=lambda row: row["number"])
    ray.shutdown()
    found = {"tasks": [vector.tolist() for vector in tasks], "rows": [row["vector"].tolist() for row in rows]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
