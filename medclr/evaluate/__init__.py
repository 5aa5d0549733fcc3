"""What an encoder knows: embeddings of whole scans."""

from medclr.evaluate.embed import EmbeddingTable, ScanDataset, WindowEmbedder

__all__ = ["EmbeddingTable", "ScanDataset", "WindowEmbedder"]
