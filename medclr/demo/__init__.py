"""The whole of medclr on one screen: from a folder of scans to a segmentation, with and without pretraining."""

from medclr.demo.main import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
