"""Uses the coordinator of the launch: rank 0 hands bytes to the others."""

import zspmd

with zspmd.Coordinator.from_env() as coordinator:
    data = coordinator.broadcast(b"from 0" if coordinator.is_master else None)
    parts = coordinator.all_gather(str(coordinator.rank).encode())
    coordinator.barrier()
    print(coordinator.launch_id, data.decode(), b",".join(parts).decode(), flush=True)
