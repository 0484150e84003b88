#version 450
// Lambert from the directional lights plus an ambient term that is brighter from above. No textures, no shadows, and
// no environment map: SAPIEN would spend seconds of CPU filtering one before the first picture.

layout(constant_id = 0) const int NUM_DIRECTIONAL_LIGHTS = 0;

layout(set = 2, binding = 0) uniform MaterialBuffer {
  vec4 emission;
  vec4 baseColor;
  float fresnel;
  float roughness;
  float metallic;
  float transmission;
  float ior;
  float transmissionRoughness;
  int textureMask;
  int padding1;
  vec4 textureTransforms[6];
} materialBuffer;

struct PointLight { vec4 position; vec4 emission; };
struct DirectionalLight { vec4 direction; vec4 emission; };
struct SpotLight { vec4 position; vec4 direction; vec4 emission; };

layout(set = 3, binding = 0) uniform SceneBuffer {
  vec4 ambientLight;
  PointLight pointLights[10];
  DirectionalLight directionalLights[3];
  SpotLight spotLights[10];
  SpotLight texturedLights[1];
} sceneBuffer;

struct LightBuffer {
  mat4 viewMatrix;
  mat4 viewMatrixInverse;
  mat4 projectionMatrix;
  mat4 projectionMatrixInverse;
  int width;
  int height;
};

// Unused here, but the renderer sizes its light buffers by these declarations.
layout(set = 3, binding = 1) uniform ShadowBuffer {
  LightBuffer pointLightBuffers[60];
  LightBuffer directionalLightBuffers[3];
  LightBuffer spotLightBuffers[10];
  LightBuffer texturedLightBuffers[1];
} shadowBuffer;

layout(set = 3, binding = 2) uniform samplerCube samplerPointLightDepths[10];
layout(set = 3, binding = 3) uniform sampler2D samplerDirectionalLightDepths[3];
layout(set = 3, binding = 4) uniform sampler2D samplerSpotLightDepths[10];
layout(set = 3, binding = 5) uniform sampler2D samplerTexturedLightDepths[1];
layout(set = 3, binding = 6) uniform sampler2D samplerTexturedLightTextures[1];

layout(location = 0) in vec3 inNormal;

layout(location = 0) out vec4 outColorRaw;
layout(location = 1) out vec4 outDistance;

void main() {
  vec3 normal = normalize(inNormal);
  vec3 light = sceneBuffer.ambientLight.rgb * (0.75 + 0.25 * normal.z);
  for (int i = 0; i < NUM_DIRECTIONAL_LIGHTS; ++i) {
    float lambert = max(dot(normal, -sceneBuffer.directionalLights[i].direction.xyz), 0);
    light += lambert / 3.14159265 * sceneBuffer.directionalLights[i].emission.rgb;
  }
  outColorRaw = vec4(clamp(pow(light * materialBuffer.baseColor.rgb, vec3(1 / 2.2)), 0, 1), 1);
  outDistance = vec4(1 / gl_FragCoord.w, 0, 0, 1);
}
