"""Exported embeddings in a Milvus database: pip install pyarrow pymilvus milvus-lite

python search.py RUN --gallery DIR --export OUT.parquet   # writes OUT.part-*.parquet
python examples/milvus.py OUT.part-*.parquet              # loads them into milvus.db
python examples/milvus.py --query NEW.part-*.parquet      # what is like these images?

--uri http://HOST:19530 is a server or a cluster instead of the local milvus.db.
"""

import argparse
import sys

import pyarrow.parquet as pq
from pymilvus import DataType, MilvusClient

ROWS = 1000  # of an upsert: Milvus takes at most 64 MB
LONGEST_PATH = 4096  # bytes


def batches(files):
    """Lists of {"path", "embedding"}, from the Parquet files of search.py or evaluate.py."""
    for file in files:
        for part in pq.ParquetFile(file).iter_batches(ROWS, columns=["path", "embedding"]):
            yield part.to_pylist()


def create(client, name, dimension, index):
    """A collection with a row for each path: an image that is loaded again replaces its row."""
    schema = client.create_schema()
    schema.add_field("path", DataType.VARCHAR, max_length=LONGEST_PATH, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dimension)
    indexed = client.prepare_index_params("embedding", index_type=index, metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=indexed)


def load(client, name, files, index):
    count = 0
    for rows in batches(files):
        if not client.has_collection(name):
            create(client, name, len(rows[0]["embedding"]), index)
        client.upsert(name, rows)
        count += len(rows)
        if count % 100_000 < len(rows):
            print(f"{count:,} images so far", file=sys.stderr)
    print(f"{count:,} images are in {name}", file=sys.stderr)


def search(client, name, files, top):
    for rows in batches(files):
        embeddings = [row["embedding"] for row in rows]
        found = client.search(name, embeddings, limit=top, consistency_level="Strong")
        for row, hits in zip(rows, found):
            print(row["path"])
            for hit in hits:
                print(f"  {hit['distance']:.4f}  {hit['path']}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="PARQUET", help="embeddings to load")
    parser.add_argument("--query", nargs="+", default=[], metavar="PARQUET", help="find their like")
    parser.add_argument("--uri", default="milvus.db", help="a path, or http://HOST:19530")
    parser.add_argument("--collection", default="images", metavar="NAME")
    parser.add_argument("--index", default="FLAT", help="FLAT is exact; for a cluster, e.g. HNSW")
    parser.add_argument("--top", type=int, default=5, help="neighbours of each query")
    args = parser.parse_args(argv)
    if not (args.files or args.query):
        parser.error("name files to load, or --query")
    client = MilvusClient(args.uri)
    if args.files:
        load(client, args.collection, args.files, args.index)
    if args.query:
        if not client.has_collection(args.collection):
            parser.error(f"{args.uri} has no collection {args.collection}; load files first")
        client.load_collection(args.collection)
        search(client, args.collection, args.query, args.top)
    client.close()


if __name__ == "__main__":
    main()
