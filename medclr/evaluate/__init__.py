"""What a network knows: embeddings of whole scans, and how well scans are segmented."""

from medclr.evaluate.embed import EmbeddingTable, ScanDataset, WindowEmbedder
from medclr.evaluate.segmentation import DiceTable

__all__ = ["DiceTable", "EmbeddingTable", "ScanDataset", "WindowEmbedder"]
