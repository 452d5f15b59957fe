#!lua name=inferpipe_tenants_v1
-- Idempotent answers and limits of keys. The keys stand at the top of redis_functions.lua; all are of the {config} slot.

-- once_begin: name body_hash claim hold_ms
-- -> {'yours'} | {'busy'} | {'conflict'} | {'done', answer}
local function once_begin(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  local h = redis.call('HMGET', key, 'body', 'claim', 'answer')
  if not h[1] then
    redis.call('HSET', key, 'body', args[2], 'claim', args[3])
    redis.call('PEXPIRE', key, args[4])
    return {'yours'}
  end
  if h[1] ~= args[2] then return {'conflict'} end
  if h[3] then return {'done', h[3]} end
  return {h[2] == args[3] and 'yours' or 'busy'}
end

-- once_finish: name claim answer ttl_ms -> 1 when the claim still held
local function once_finish(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  if redis.call('HGET', key, 'claim') ~= args[2] then return 0 end
  redis.call('HSET', key, 'answer', args[3])
  return redis.call('PEXPIRE', key, args[4])
end

-- once_drop: name claim -> 1 when a claim without an answer was given up
local function once_drop(keys, args)
  local key = keys[1] .. ':once:' .. args[1]
  local h = redis.call('HMGET', key, 'claim', 'answer')
  if h[1] ~= args[2] or h[2] then return 0 end
  return redis.call('DEL', key)
end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

-- take: name requests_max window_ms tokens_max window_ms tokens_spent_ever
-- -> {1 when allowed, which limit, its maximum, what remains, ms until it is renewed}
-- A maximum of 0 is none. A window begins with the first call after the last one ended. Of tokens
-- it remembers what had been spent when it began; a sum that fell was forgotten after long idleness.
local function take(keys, args)
  local key, now = keys[1] .. ':limit:' .. args[1], now_ms()
  local requests_max, requests_ms = tonumber(args[2]), tonumber(args[3])
  local tokens_max, tokens_ms, spent = tonumber(args[4]), tonumber(args[5]), tonumber(args[6])
  local h = redis.call('HMGET', key, 'requests', 'requests_at', 'base', 'tokens_at')
  local count, requests_at = tonumber(h[1] or '0'), tonumber(h[2] or '0')
  local base, tokens_at = tonumber(h[3] or '0'), tonumber(h[4] or '0')
  if now >= requests_at + requests_ms then count, requests_at = 0, now end
  if now >= tokens_at + tokens_ms or spent < base then base, tokens_at = spent, now end
  local tokens_left, tokens_reset = tokens_max - (spent - base), tokens_at + tokens_ms - now
  if tokens_max > 0 and tokens_left <= 0 then
    return {0, 'tokens', tokens_max, 0, tokens_reset}
  end
  local requests_reset = requests_at + requests_ms - now
  if requests_max > 0 and count >= requests_max then
    return {0, 'requests', requests_max, 0, requests_reset}
  end
  redis.call('HSET', key, 'requests', count + 1, 'requests_at', string.format('%.0f', requests_at),
    'base', string.format('%.0f', base), 'tokens_at', string.format('%.0f', tokens_at))
  redis.call('PEXPIRE', key, math.max(requests_ms, tokens_ms))
  if requests_max > 0 then
    return {1, 'requests', requests_max, requests_max - count - 1, requests_reset}
  end
  return {1, 'tokens', tokens_max, tokens_left, tokens_reset}
end

redis.register_function('ip1_take', take)
redis.register_function('ip1_once_begin', once_begin)
redis.register_function('ip1_once_finish', once_finish)
redis.register_function('ip1_once_drop', once_drop)
