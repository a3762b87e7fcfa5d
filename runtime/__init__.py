"""The asyncio side: launching, driving, and the engine. Never imports torch."""
