"""A batch that runs beside the load, in whichever router lives."""

import asyncio
import json
from collections import Counter

from openai import APIError, AsyncOpenAI

from tests.chaos.cluster import LOCAL, Cluster

LINES = 30
REQUESTS = LINES + len(LOCAL)  # in all
ENDPOINT = "/v1/completions"
RETRIES = 30  # until a router has started again
END_SECONDS = 240  # from the end of the load on


class Batch:
    def __init__(self, cluster: Cluster) -> None:
        self._clients = [
            AsyncOpenAI(base_url=f"http://127.0.0.1:{place.http_port}/v1", api_key="none", max_retries=RETRIES)
            for place in cluster.places
        ]
        self._id = ""

    async def begin(self) -> None:
        lines = [
            {"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": _body(number)}
            for number in range(LINES)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = await self._clients[0].files.create(file=("in.jsonl", content), purpose="batch")
        batch = await self._clients[0].batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        self._id = batch.id

    async def audit(self) -> list[str]:
        """Waits for the end. Returns what is wrong, in words: each line must be answered once, as alone."""
        client, batch = self._clients[-1], None
        try:
            async with asyncio.timeout(END_SECONDS):
                while (batch := await client.batches.retrieve(self._id)).status != "completed":
                    await asyncio.sleep(1)
            assert batch.output_file_id
            rows = [json.loads(row) for row in (await client.files.content(batch.output_file_id)).text.splitlines()]
            alone = [(await client.completions.create(**_body(number))).choices[0].text for number in range(len(LOCAL))]
        except (TimeoutError, APIError) as error:
            return [f"the batch: {type(error).__name__}: {error}; it was {batch}"]
        finally:
            await asyncio.gather(*(each.close() for each in self._clients))
        counts = Counter(int(row["custom_id"]) for row in rows)
        faults = [f"line {line} of the batch has {counts[line]} answers" for line in range(LINES) if counts[line] != 1]
        texts = ((int(row["custom_id"]), row["response"]["body"]["choices"][0]["text"]) for row in rows)
        right = {line: alone[line % len(LOCAL)] for line in range(LINES)}
        return faults + [f"line {line} of the batch is {text!r}" for line, text in texts if text != right[line]]


def _body(number: int) -> dict[str, object]:
    return {"model": LOCAL[number % len(LOCAL)], "prompt": "A line", "max_tokens": 40, "temperature": 0}
