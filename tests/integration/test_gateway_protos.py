"""A client that knows only the protos, or only reflection, can use a gateway."""

import subprocess
import sys
from pathlib import Path

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from helios.client import AsyncClient, Client, generate_request
from helios.v1.generation_pb2 import SamplingParams, Token
from tests.stack import Process
from tests.streams import stream

PROTOS = Path(__file__).parents[2] / "protos"
REQUEST = generate_request("class Parser", sampling=SamplingParams(max_tokens=20, ignore_eos=True))

CLIENT = """
import os
import sys

import grpc
from helios.v1 import generation_pb2, inference_pb2, inference_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    sampling = generation_pb2.SamplingParams(max_tokens=20, ignore_eos=True)
    for response in stub.Generate(inference_pb2.GenerateRequest(text="class Parser", sampling=sampling)):
        print(*(token.token_id for token in response.chunk.tokens), end=" ")

# No code of the project was imported.
for name, module in sys.modules.items():
    if name.startswith("helios.") and getattr(module, "__file__", None):
        assert module.__file__.startswith(os.getcwd()), module
"""


def test_a_client_generated_from_the_protos_alone_streams(gateway: Process, tmp_path: Path) -> None:
    protos = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    generate = ["-m", "grpc_tools.protoc", f"-I{PROTOS}", "--python_out=.", "--grpc_python_out=."]
    subprocess.run([sys.executable, *generate, *protos], cwd=tmp_path, check=True)
    (tmp_path / "client.py").write_text(CLIENT)
    command = [sys.executable, "client.py", gateway.address]
    ran = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    with Client(gateway.address) as client:
        ids = [event.token_id for event in client.generate(REQUEST) if isinstance(event, Token)]
    assert [int(part) for part in ran.stdout.split()] == ids


async def test_a_client_that_knows_only_reflection_streams(gateway: Process, client: AsyncClient) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        pool = await reflected(channel, "helios.v1.InferenceService")
        method = pool.FindServiceByName("helios.v1.InferenceService").methods_by_name["Generate"]
        request = message_factory.GetMessageClass(method.input_type)(
            text="class Parser", sampling={"max_tokens": 20, "ignore_eos": True}
        )
        call = channel.unary_stream(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )(request)
        ids = [token.token_id async for response in call for token in response.chunk.tokens]
    assert ids == (await stream(client, REQUEST)).ids


async def reflected(channel: grpc.aio.Channel, symbol: str) -> descriptor_pool.DescriptorPool:
    """Asks the server for the descriptors of a symbol's file and of the files that it imports."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}

    async def ask(request: reflection_pb2.ServerReflectionRequest) -> None:
        await call.write(request)
        response = await call.read()
        for data in response.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
            for name in file.dependency:
                if name not in files:
                    await ask(reflection_pb2.ServerReflectionRequest(file_by_filename=name))

    await ask(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
    await call.done_writing()
    pool = descriptor_pool.DescriptorPool()
    while files:
        for name, file in list(files.items()):
            if not any(dependency in files for dependency in file.dependency):
                pool.Add(files.pop(name))
    return pool
